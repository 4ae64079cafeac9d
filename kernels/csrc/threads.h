/* Loops that several threads share. */

#ifndef MAKEREADY_THREADS_H
#define MAKEREADY_THREADS_H

#include <stdint.h>

/* Items `first` .. `stop` of a loop over `job`. */
typedef void (*Part)(const void *job, int64_t first, int64_t stop);

/* Run `part` over the items 0 .. `count` in the calling thread and at most `threads` - 1 others; returns when all
 * are done. Parts are handed out as threads ask for them, so the caller waits for no thread that has not begun. */
void share_out(Part part, const void *job, int64_t count, int64_t threads);

#endif
