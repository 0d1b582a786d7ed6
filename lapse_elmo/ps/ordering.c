/* Orders plain memory accesses of one process as other processes see them.
 *
 * NumPy reads and writes shared memory by plain loads and stores, which processors other than x86 may reorder. A writer
 * calls fence between what it publishes and the number that announces it, a reader between the number and the rest.
 */
void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
