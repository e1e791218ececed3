/* A thread that gives copies to the CUDA driver, without the interpreter.

   Giving the driver a layer of slices takes milliseconds. A thread of Python's that does so takes the interpreter's lock
   after every call, and each time a thread that launches kernels has to wait until it gets it back. This one never has
   it: what it does is laid out in C structures before, and whoever submits it only appends to a list.

   Two things here cost a thread that launches kernels more than that:
   * To wake another thread takes a system call. So while layers follow one another this thread looks for work by itself,
     every NAP_NS, and sleeps until it is woken only when nothing came for LINGER_NS.
   * While the driver takes a batch of copies, it launches no kernel. So between two it is left alone for PAUSE times as
     long as the one before took, unless somebody waits, or begins to. Slices are then given faster than links take them
     still: 64 of 2 MiB in 0.2 ms.

   A child that fork made has none of this process's threads, and locks as they were at that moment, held for good
   perhaps. So there nothing here locks or waits: what would have to is refused, and what ends leaves the rest alone. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#define NAP_NS 50000
#ifndef LINGER_NS
#define LINGER_NS 20000000
#endif
#ifndef PAUSE
#define PAUSE 3
#endif

/* cuCtxSetCurrent, cuStreamWaitEvent, cuMemcpyBatchAsync and cuEventRecordWithFlags; 0 is success */
typedef int (*SetCurrent)(void *context);
typedef int (*WaitEvent)(void *stream, void *event, unsigned flags);
typedef int (*CopyBatch)(void *dsts, void *srcs, void *sizes, size_t count, void *attributes, void *firsts,
                         size_t num_attributes, void *stream);
typedef int (*RecordEvent)(void *event, void *stream, unsigned flags);

typedef struct {
    void *dsts, *srcs, *sizes, *attributes, *firsts;
    size_t count, num_attributes;
} Batch;

typedef struct { /* one stream: wait for `after`, copy, record `then` */
    void *stream, *after, *then;
    Batch *batches;
    size_t num_batches;
} Lane;

enum { READY, SUBMITTED, DONE, FAILED }; /* a job's states */

typedef struct Issuer Issuer;

typedef struct Job {
    PyObject_HEAD
    Issuer *issuer;
    PyObject *kept; /* what the lanes' addresses point into */
    Lane *lanes;
    size_t num_lanes;
    struct Job *next; /* in the list of what was submitted */
    int state;        /* written under the issuer's lock, read without it too */
    const char *call; /* the one that failed */
    int result;
} Job;

struct Issuer {
    PyObject_HEAD
    SetCurrent set_current;
    WaitEvent wait_event;
    CopyBatch copy_batch;
    RecordEvent record_event;
    void *context;
    PyObject *failure; /* makes an exception of the name of a call and its result */
    unsigned forks; /* as they were when this was made */
    pthread_t thread;
    pthread_mutex_t lock; /* of all below, and of the jobs' states */
    pthread_cond_t work, hurry, progress;
    Job *first, *last;
    uint64_t submitted, ended; /* jobs; they end in the order of submission */
    int started, asleep, waiting, closing, running;
    int start_result;
};

static unsigned forks; /* that lie between the process that loaded this and the one that it runs in */

static void count_fork(void) {
    forks++;
}

/* Whether this process has the issuer's thread; if not, with an exception. */
static int is_here(const Issuer *issuer) {
    if (issuer->forks == forks)
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "copies are given to the driver by a thread of the process that this one was "
                                        "forked from: use spawn, or make the runtime after the fork");
    return 0;
}

static int64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * INT64_C(1000000000) + at.tv_nsec;
}

static void nap(int64_t ns) {
    const struct timespec length = {ns / 1000000000, ns % 1000000000};
    nanosleep(&length, NULL);
}

/* Leave the driver alone for a while, unless somebody waits or begins to. */
static void leave_alone(Issuer *issuer, int64_t ns) {
    const int64_t until = now_ns() + ns;
    const struct timespec at = {until / 1000000000, until % 1000000000};
    pthread_mutex_lock(&issuer->lock);
    while (!issuer->waiting && !issuer->closing && pthread_cond_timedwait(&issuer->hurry, &issuer->lock, &at) == 0)
        ;
    pthread_mutex_unlock(&issuer->lock);
}

static const char *run(Issuer *issuer, const Job *job, int *result) {
    for (size_t i = 0; i < job->num_lanes; i++) {
        const Lane *lane = &job->lanes[i];
        if ((*result = issuer->wait_event(lane->stream, lane->after, 0)))
            return "cuStreamWaitEvent";
        for (size_t j = 0; j < lane->num_batches; j++) {
            const Batch *b = &lane->batches[j];
            const int64_t start = now_ns();
            if ((*result = issuer->copy_batch(b->dsts, b->srcs, b->sizes, b->count, b->attributes, b->firsts,
                                              b->num_attributes, lane->stream)))
                return "cuMemcpyBatchAsync";
            if (j + 1 < lane->num_batches)
                leave_alone(issuer, PAUSE * (now_ns() - start));
        }
        if ((*result = issuer->record_event(lane->then, lane->stream, 0)))
            return "cuEventRecordWithFlags";
    }
    return NULL;
}

/* The next job, or NULL after close, with the lock held. */
static Job *next_job(Issuer *issuer) {
    int64_t until = now_ns() + LINGER_NS;
    while (!issuer->first && !issuer->closing) {
        if (now_ns() < until) {
            pthread_mutex_unlock(&issuer->lock);
            nap(NAP_NS);
            pthread_mutex_lock(&issuer->lock);
        } else {
            issuer->asleep = 1;
            pthread_cond_wait(&issuer->work, &issuer->lock);
            issuer->asleep = 0;
        }
    }
    Job *job = issuer->first;
    if (job && !(issuer->first = job->next))
        issuer->last = NULL;
    return job;
}

static void *serve(void *argument) {
    Issuer *issuer = argument;
    prctl(PR_SET_NAME, "vmm-dwdp-issue");
    prctl(PR_SET_TIMERSLACK, 1000); /* or a nap would take twice as long */
    pthread_mutex_lock(&issuer->lock);
    issuer->start_result = issuer->set_current(issuer->context);
    issuer->started = 1;
    pthread_cond_broadcast(&issuer->progress);
    for (Job *job; (job = next_job(issuer));) {
        pthread_mutex_unlock(&issuer->lock);
        int result = 0;
        const char *call = run(issuer, job, &result);
        pthread_mutex_lock(&issuer->lock);
        job->call = call;
        job->result = result;
        __atomic_store_n(&job->state, call ? FAILED : DONE, __ATOMIC_RELEASE);
        issuer->ended++;
        pthread_cond_broadcast(&issuer->progress);
    }
    pthread_mutex_unlock(&issuer->lock);
    return NULL;
}

/* Wait until `job` is over, or, without one, all that was submitted so far. */
static void await(Issuer *issuer, const Job *job) {
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&issuer->lock);
    const uint64_t submitted = issuer->submitted;
    issuer->waiting++;
    pthread_cond_signal(&issuer->hurry);
    while (job ? job->state == SUBMITTED : issuer->ended < submitted)
        pthread_cond_wait(&issuer->progress, &issuer->lock);
    issuer->waiting--;
    pthread_mutex_unlock(&issuer->lock);
    Py_END_ALLOW_THREADS
}

/* -- Job ----------------------------------------------------------------------------------------------------------- */

static void free_lanes(Job *job) {
    for (size_t i = 0; i < job->num_lanes; i++)
        PyMem_Free(job->lanes[i].batches);
    PyMem_Free(job->lanes);
}

static void job_dealloc(PyObject *self) {
    Job *job = (Job *)self;
    if (job->issuer && job->issuer->forks == forks)
        await(job->issuer, job);
    free_lanes(job);
    Py_XDECREF(job->kept);
    Py_XDECREF((PyObject *)job->issuer);
    PyTypeObject *type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static int read_batch(PyObject *tuple, Batch *batch) {
    unsigned long long dsts, srcs, sizes, attributes, firsts;
    Py_ssize_t count, num_attributes;
    if (!PyArg_ParseTuple(tuple, "KKKnKKn", &dsts, &srcs, &sizes, &count, &attributes, &firsts, &num_attributes))
        return -1;
    *batch = (Batch){(void *)dsts, (void *)srcs, (void *)sizes, (void *)attributes, (void *)firsts, count, num_attributes};
    return 0;
}

static int read_lane(PyObject *tuple, Lane *lane) {
    unsigned long long stream, after, then;
    PyObject *batches;
    if (!PyArg_ParseTuple(tuple, "KKO!K", &stream, &after, &PyTuple_Type, &batches, &then))
        return -1;
    Py_ssize_t count = PyTuple_Size(batches);
    *lane = (Lane){(void *)stream, (void *)after, (void *)then, PyMem_Calloc(count, sizeof(Batch)), count};
    if (!lane->batches)
        return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < count; i++)
        if (read_batch(PyTuple_GetItem(batches, i), &lane->batches[i]))
            return -1;
    return 0;
}

static PyTypeObject *job_type, *issuer_type;

static PyObject *issuer_job(PyObject *self, PyObject *arguments) {
    PyObject *lanes, *kept;
    if (!PyArg_ParseTuple(arguments, "O!O", &PyTuple_Type, &lanes, &kept))
        return NULL;
    Job *job = PyObject_New(Job, job_type);
    if (!job)
        return NULL;
    memset((char *)job + sizeof(PyObject), 0, sizeof(Job) - sizeof(PyObject));
    Py_ssize_t count = PyTuple_Size(lanes);
    job->issuer = (Issuer *)Py_NewRef(self);
    job->kept = Py_NewRef(kept);
    job->lanes = PyMem_Calloc(count, sizeof(Lane));
    if (!job->lanes) {
        Py_DECREF(job);
        return PyErr_NoMemory();
    }
    for (; job->num_lanes < (size_t)count; job->num_lanes++)
        if (read_lane(PyTuple_GetItem(lanes, job->num_lanes), &job->lanes[job->num_lanes])) {
            job->num_lanes++;
            Py_DECREF(job);
            return NULL;
        }
    return (PyObject *)job;
}

static PyObject *fail(Issuer *issuer, const char *call, int result) {
    PyObject *error = PyObject_CallFunction(issuer->failure, "si", call, result);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    return NULL;
}

static PyObject *job_result(PyObject *self, PyObject *unused) {
    Job *job = (Job *)self;
    if (!is_here(job->issuer))
        return NULL;
    await(job->issuer, job);
    return job->state == FAILED ? fail(job->issuer, job->call, job->result) : Py_NewRef(Py_None);
}

static PyObject *job_done(PyObject *self, void *unused) {
    return PyBool_FromLong(__atomic_load_n(&((Job *)self)->state, __ATOMIC_ACQUIRE) == DONE);
}

/* -- Issuer -------------------------------------------------------------------------------------------------------- */

static PyObject *issuer_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    unsigned long long set_current, wait_event, copy_batch, record_event, context;
    PyObject *failure;
    if (!PyArg_ParseTuple(arguments, "KKKKKO", &set_current, &wait_event, &copy_batch, &record_event, &context, &failure))
        return NULL;
    Issuer *issuer = PyObject_New(Issuer, type);
    if (!issuer)
        return NULL;
    memset((char *)issuer + sizeof(PyObject), 0, sizeof(Issuer) - sizeof(PyObject));
    issuer->set_current = (SetCurrent)set_current;
    issuer->wait_event = (WaitEvent)wait_event;
    issuer->copy_batch = (CopyBatch)copy_batch;
    issuer->record_event = (RecordEvent)record_event;
    issuer->context = (void *)context;
    issuer->failure = Py_NewRef(failure);
    issuer->forks = forks;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&issuer->hurry, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&issuer->lock, NULL);
    pthread_cond_init(&issuer->work, NULL);
    pthread_cond_init(&issuer->progress, NULL);
    int failed = pthread_create(&issuer->thread, NULL, serve, issuer);
    if (failed) {
        Py_DECREF(issuer);
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    issuer->running = 1;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&issuer->lock);
    while (!issuer->started)
        pthread_cond_wait(&issuer->progress, &issuer->lock);
    pthread_mutex_unlock(&issuer->lock);
    Py_END_ALLOW_THREADS
    if (issuer->start_result) {
        fail(issuer, "cuCtxSetCurrent", issuer->start_result);
        Py_DECREF(issuer);
        return NULL;
    }
    return (PyObject *)issuer;
}

static void close_issuer(Issuer *issuer) {
    if (!issuer->running || issuer->forks != forks)
        return;
    issuer->running = 0;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&issuer->lock);
    issuer->closing = 1;
    pthread_cond_signal(&issuer->work);
    pthread_cond_signal(&issuer->hurry);
    pthread_mutex_unlock(&issuer->lock);
    pthread_join(issuer->thread, NULL);
    Py_END_ALLOW_THREADS
}

static void issuer_dealloc(PyObject *self) {
    Issuer *issuer = (Issuer *)self;
    close_issuer(issuer);
    if (issuer->forks == forks) {
        pthread_mutex_destroy(&issuer->lock);
        pthread_cond_destroy(&issuer->work);
        pthread_cond_destroy(&issuer->hurry);
        pthread_cond_destroy(&issuer->progress);
    }
    Py_DECREF(issuer->failure);
    PyTypeObject *type = Py_TYPE(self);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *issuer_submit(PyObject *self, PyObject *argument) {
    Issuer *issuer = (Issuer *)self;
    Job *job = (Job *)argument;
    if (!PyObject_TypeCheck(argument, job_type) || job->issuer != issuer)
        return PyErr_SetString(PyExc_TypeError, "not a job of this issuer"), NULL;
    if (!is_here(issuer))
        return NULL;
    if (!issuer->running || __atomic_load_n(&job->state, __ATOMIC_RELAXED) == SUBMITTED)
        return PyErr_SetString(PyExc_RuntimeError, issuer->running ? "submitted already" : "closed"), NULL;
    pthread_mutex_lock(&issuer->lock);
    __atomic_store_n(&job->state, SUBMITTED, __ATOMIC_RELAXED);
    job->next = NULL;
    if (issuer->last)
        issuer->last->next = job;
    else
        issuer->first = job;
    issuer->last = job;
    issuer->submitted++;
    int asleep = issuer->asleep;
    pthread_mutex_unlock(&issuer->lock);
    if (asleep)
        pthread_cond_signal(&issuer->work);
    return Py_NewRef(Py_None);
}

static PyObject *issuer_flush(PyObject *self, PyObject *unused) {
    Issuer *issuer = (Issuer *)self;
    if (issuer->forks == forks)
        await(issuer, NULL);
    return Py_NewRef(Py_None);
}

static PyObject *issuer_close(PyObject *self, PyObject *unused) {
    close_issuer((Issuer *)self);
    return Py_NewRef(Py_None);
}

static PyMethodDef job_methods[] = {
    {"result", job_result, METH_NOARGS, "Wait until the driver was given everything, and raise what it refused."},
    {NULL},
};
static PyGetSetDef job_members[] = {
    {"done", job_done, NULL, "Whether the driver was given everything.", NULL},
    {NULL},
};
static PyType_Slot job_slots[] = {
    {Py_tp_methods, job_methods},
    {Py_tp_getset, job_members},
    {Py_tp_dealloc, job_dealloc},
    {0, NULL},
};
static PyType_Spec job_spec = {"vmm_dwdp.allocator._issue.Job", sizeof(Job), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

static PyMethodDef issuer_methods[] = {
    {"job", issuer_job, METH_VARARGS, "Lanes, and what their addresses point into, as a job."},
    {"submit", issuer_submit, METH_O, "Append a job to what is to be done. It must stay alive until it is over."},
    {"flush", issuer_flush, METH_NOARGS, "Wait until all that was submitted was given to the driver, or refused by it."},
    {"close", issuer_close, METH_NOARGS, "Finish what was submitted, and end the thread."},
    {NULL},
};
static PyType_Slot issuer_slots[] = {
    {Py_tp_new, issuer_new},
    {Py_tp_methods, issuer_methods},
    {Py_tp_dealloc, issuer_dealloc},
    {0, NULL},
};
static PyType_Spec issuer_spec = {"vmm_dwdp.allocator._issue.Issuer", sizeof(Issuer), 0, Py_TPFLAGS_DEFAULT,
                                  issuer_slots};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_issue", "A thread that gives copies to the CUDA driver.",
                                    -1, NULL};

PyMODINIT_FUNC PyInit__issue(void) {
    PyObject *made = PyModule_Create(&module);
    if (!made)
        return NULL;
    static int counting;
    if (!counting && (errno = pthread_atfork(NULL, NULL, count_fork)))
        return Py_DECREF(made), PyErr_SetFromErrno(PyExc_OSError);
    counting = 1;
    job_type = (PyTypeObject *)PyType_FromSpec(&job_spec);
    issuer_type = (PyTypeObject *)PyType_FromSpec(&issuer_spec);
    if (!job_type || !issuer_type || PyModule_AddObjectRef(made, "Job", (PyObject *)job_type) ||
        PyModule_AddObjectRef(made, "Issuer", (PyObject *)issuer_type)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
