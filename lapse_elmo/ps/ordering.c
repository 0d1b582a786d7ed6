/* A full memory fence, for use from Python.
 *
 * NumPy accesses shared memory by plain loads and stores, which processors other than x86 may reorder. A writer calls
 * fence between writing data and writing the counter that announces them; a reader calls it between reading the counter
 * and reading the data.
 */
void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
