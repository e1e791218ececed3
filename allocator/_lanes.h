/* What a stream is given, and the calls of the CUDA driver that give it; 0 is success. */

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "_turns.h"

typedef int (*SetCurrent)(void *context); /* cuCtxSetCurrent */
typedef int (*WaitEvent)(void *stream, void *event, unsigned flags);
typedef int (*CopyBatch)(void *dsts, void *srcs, void *sizes, size_t count, void *attributes, void *firsts,
                         size_t num_attributes, void *stream); /* cuMemcpyBatchAsync */
typedef int (*RecordEvent)(void *event, void *stream, unsigned flags);
typedef int (*WriteValue)(void *stream, uint64_t address, uint32_t value, unsigned flags); /* cuStreamWriteValue32 */
typedef int (*QueryEvent)(void *event);

typedef int (*ExchangeMode)(int *mode); /* cuThreadExchangeStreamCaptureMode */

#define RELAXED 2     /* mode: no call of this thread ends what another one captures, as asking an event would */
#define NOT_READY 600 /* of QueryEvent */

typedef struct {
    void *dsts, *srcs, *sizes, *attributes, *firsts;
    size_t count, num_attributes;
    uint64_t nbytes; /* of all copies */
} Batch;

enum { WRITTEN, TOLD, NUM_WORDS }; /* of a stream: what it wrote last, and what it was told to write last */

typedef struct { /* one stream: wait for `after`, copy, record `then` */
    void *stream, *after, *then;
    Batch *batches;
    size_t num_batches;
    int owner;         /* of the bytes, if they come in runs of which the next is chosen; else NOBODY */
    uint32_t *words;   /* of the stream, where the device sees them, too; this and the next for lanes with an owner */
    size_t next;       /* batch to be given */
} Lane;
