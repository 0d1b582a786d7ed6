/* The steps of one LSTM layer in one direction, over packed rows (packing.py), in one call.
 *
 * A step takes a few calls of kernels that each run for microseconds, so that a loop in Python would spend as long
 * between the calls as in them, and two threads would wait for each other's interpreter lock. Here the loop calls the
 * kernels of pointwise.c and prepacked.c by their addresses. lstm_pass.py has the same loop in Python, for other devices,
 * types and products; both give bitwise the same results.
 *
 * Step t has sizes[t] rows, which never increase from step to step: the unfinished sentences are a prefix of the sorted
 * ones. The rows of all steps are contiguous, step after step. D is the size of the hidden state, C that of the cell.
 * Stored elements have `stored` bytes; cells, biases and dropout masks have `wide` bytes per element.
 */
typedef void multiply(long n, long K, long N, const void *a, const void *weight, void *c, int add);
typedef void cell_forward(long n, long C, void *gates, const void *bias, const void *previous_cells, void *cells,
                          void *cell_output, double clip);
typedef void clip_forward(long n, long D, void *hidden, const void *mask, double clip);
typedef void cell_backward(long n, long C, void *gates, const void *previous_cells, const void *cells,
                           void *cell_output, const void *d_cell_output, void *d_cells, double clip);
typedef void clip_backward(long n, long D, void *d_hidden, const void *d_recurrent, const void *hidden,
                           const void *mask, double clip);

/* gates (N, 4C): the input's part of the pre-activations; replaced by the activated gates. recurrent, projection: the
 * prepacked weights (D, 4C) and (C, D). initial_hidden (B, D), initial_cells (B, C), mask (B, D): NULL for none.
 * cells (N, C), hidden (N, D): outputs. cell_output (B, C): scratch. */
void lstm_steps_forward(long num_steps, const long *sizes, long D, long C, long stored, long wide, multiply *multiply,
                        cell_forward *cell_forward, clip_forward *clip_forward, char *gates, const void *recurrent,
                        const void *bias, const void *projection, const char *initial_hidden, const char *initial_cells,
                        const char *mask, char *cells, char *hidden, void *cell_output, double cell_clip,
                        double projection_clip) {
  const char *previous_hidden = initial_hidden, *previous_cells = initial_cells;
  for (long step = 0; step < num_steps; step++) {
    long n = sizes[step];
    if (previous_hidden) multiply(n, D, 4 * C, previous_hidden, recurrent, gates, 1);
    cell_forward(n, C, gates, bias, previous_cells, cells, cell_output, cell_clip);
    multiply(n, C, D, cell_output, projection, hidden, 0);
    clip_forward(n, D, hidden, mask, projection_clip);
    previous_hidden = hidden;
    previous_cells = cells;
    gates += n * 4 * C * stored;
    cells += n * C * wide;
    hidden += n * D * stored;
  }
}

/* From the last step to the first. gates (N, 4C): the activated gates; replaced by the gradients of the pre-activations.
 * recurrent, projection: the prepacked transposed weights (4C, D) and (D, C). d_hidden (N, D): gradient from the layer
 * above; replaced by the gradient before clipping and dropout. cell_output (N, C): output, may be `cells`.
 * d_recurrent (B, D), d_cells (B, C): zero; d_cell_output (B, C): scratch. */
void lstm_steps_backward(long num_steps, const long *sizes, long num_rows, long D, long C, long stored, long wide,
                         multiply *multiply, cell_backward *cell_backward, clip_backward *clip_backward, char *gates,
                         const void *recurrent, const void *projection, const char *initial_cells, const char *mask,
                         const char *cells, const char *hidden, char *d_hidden, char *cell_output, void *d_recurrent,
                         void *d_cells, void *d_cell_output, double cell_clip, double projection_clip) {
  long row = num_rows;
  for (long step = num_steps - 1; step >= 0; step--) {
    long n = sizes[step];
    row -= n;
    char *step_gates = gates + row * 4 * C * stored, *d_step = d_hidden + row * D * stored;
    const char *step_cells = cells + row * C * wide;
    const char *previous_cells = step ? step_cells - sizes[step - 1] * C * wide : initial_cells;
    clip_backward(n, D, d_step, d_recurrent, hidden + row * D * stored, mask, projection_clip);
    multiply(n, D, C, d_step, projection, d_cell_output, 0);
    cell_backward(n, C, step_gates, previous_cells, step_cells, cell_output + row * C * stored, d_cell_output, d_cells,
                  cell_clip);
    if (step) multiply(n, 4 * C, D, step_gates, recurrent, d_recurrent, 0);
  }
}
