/* The thread of _issue_thread.h as Python's types Issuer and Job.

   Whatever waits here does so without the interpreter's lock. In a child of fork what would have to lock or wait is
   refused, and what ends leaves the rest alone. */

#include "_issue.h"

#include <errno.h>

#include "_issue_thread.h"

typedef struct {
    PyObject_HEAD
    Issuer issuer;
    PyObject *failure; /* makes an exception of the name of a call and its result */
    int running;       /* from the thread's start until somebody closes it; under the interpreter's lock */
} IssuerObject;

typedef struct {
    PyObject_HEAD
    IssuerObject *owner;
    PyObject *kept; /* what the lanes' addresses point into */
    Job job;
} JobObject;

static PyTypeObject *job_type, *issuer_type;

/* Whether this process has the issuer's thread; if not, with an exception. */
static int check_here(const IssuerObject *owner) {
    if (is_here(&owner->issuer))
        return 1;
    PyErr_SetString(PyExc_RuntimeError, "copies are given to the driver by a thread of the process that this one was "
                                        "forked from: use spawn, or make the runtime after the fork");
    return 0;
}

/* See await_job; in a child of fork there is nothing to wait for. */
static void await(IssuerObject *owner, const Job *job) {
    if (!is_here(&owner->issuer))
        return;
    Py_BEGIN_ALLOW_THREADS
    await_job(&owner->issuer, job);
    Py_END_ALLOW_THREADS
}

/* -- Job ----------------------------------------------------------------------------------------------------------- */

static void job_dealloc(PyObject *object) {
    JobObject *self = (JobObject *)object;
    await(self->owner, &self->job);
    for (size_t i = 0; i < self->job.num_lanes; i++)
        PyMem_Free(self->job.lanes[i].batches);
    PyMem_Free(self->job.lanes);
    Py_DECREF(self->kept);
    Py_DECREF((PyObject *)self->owner);
    free_object(object);
}

static int read_batch(PyObject *tuple, Batch *batch) {
    unsigned long long dsts, srcs, sizes, attributes, firsts, nbytes = 0;
    Py_ssize_t count, num_attributes;
    if (!PyArg_ParseTuple(tuple, "KKKnKKn|K", &dsts, &srcs, &sizes, &count, &attributes, &firsts, &num_attributes,
                          &nbytes))
        return -1;
    *batch = (Batch){(void *)dsts, (void *)srcs, (void *)sizes, (void *)attributes, (void *)firsts, count, num_attributes, nbytes};
    return 0;
}

/* Whether a job's latest lane can be chosen: it is of another rank that no lane before is of, and no run is empty. */
static int can_be_chosen(const Page *page, const Job *job) {
    const Lane *lane = &job->lanes[job->num_lanes - 1];
    int is_good = lane->owner >= 0 && lane->owner < page->num_ranks && lane->owner != page->rank && lane->words;
    for (size_t i = 0; i < lane->num_batches; i++)
        is_good = is_good && lane->batches[i].nbytes;
    for (size_t i = 0; i + 1 < job->num_lanes; i++)
        is_good = is_good && job->lanes[i].owner != lane->owner;
    return is_good;
}

static int read_lane(PyObject *tuple, Lane *lane) {
    unsigned long long stream, after, then, words = 0;
    PyObject *batches;
    int whose = NOBODY;
    if (!PyArg_ParseTuple(tuple, "KKO!K|iK", &stream, &after, &PyTuple_Type, &batches, &then, &whose, &words))
        return -1;
    Py_ssize_t count = PyTuple_Size(batches);
    *lane = (Lane){(void *)stream, (void *)after, (void *)then, PyMem_Calloc(count, sizeof(Batch)), count, whose,
                   (uint32_t *)words, 0};
    if (!lane->batches)
        return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < count; i++)
        if (read_batch(PyTuple_GetItem(batches, i), &lane->batches[i]))
            return -1;
    return 0;
}

static PyObject *issuer_job(PyObject *object, PyObject *arguments) {
    PyObject *lanes, *kept;
    if (!PyArg_ParseTuple(arguments, "O!O", &PyTuple_Type, &lanes, &kept))
        return NULL;
    JobObject *made = PyObject_New(JobObject, job_type);
    if (!made)
        return NULL;
    const Py_ssize_t count = PyTuple_Size(lanes);
    made->owner = (IssuerObject *)Py_NewRef(object);
    made->kept = Py_NewRef(kept);
    made->job = (Job){.lanes = PyMem_Calloc(count, sizeof(Lane))};
    if (!made->job.lanes) {
        Py_DECREF(made);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Lane *lane = &made->job.lanes[i];
        lane->owner = NOBODY;
        made->job.num_lanes++; /* also if it is refused: it may have batches to free */
        if (read_lane(PyTuple_GetItem(lanes, i), lane)) {
            Py_DECREF(made);
            return NULL;
        }
        made->job.num_chosen += lane->owner != NOBODY;
        if (lane->owner == NOBODY ? made->job.num_chosen : !can_be_chosen(&made->owner->issuer.pulls.page, &made->job)) {
            PyErr_SetString(PyExc_ValueError, "runs come last, each lane's of another rank, and none is empty");
            Py_DECREF(made);
            return NULL;
        }
    }
    return (PyObject *)made;
}

static PyObject *job_result(PyObject *object, PyObject *unused) {
    JobObject *self = (JobObject *)object;
    if (!check_here(self->owner))
        return NULL;
    await(self->owner, &self->job);
    if (job_state(&self->job) == FAILED)
        return raise_failure(self->owner->failure, self->job.call, self->job.result), NULL;
    return Py_NewRef(Py_None);
}

static PyObject *job_done(PyObject *object, void *unused) {
    return PyBool_FromLong(is_given(object));
}

static PyObject *job_whole(PyObject *object, void *unused) {
    return PyBool_FromLong(((JobObject *)object)->job.is_whole);
}

static int set_job_whole(PyObject *object, PyObject *value, void *unused) {
    Job *job = &((JobObject *)object)->job;
    const int is_whole = value ? PyObject_IsTrue(value) : 0;
    if (is_whole >= 0 && job_state(job) != SUBMITTED)
        return job->is_whole = is_whole, 0;
    if (is_whole >= 0)
        PyErr_SetString(PyExc_RuntimeError, "submitted already");
    return -1;
}

/* -- Issuer -------------------------------------------------------------------------------------------------------- */

/* By which lines runs are chosen, and the calls that this takes. */
static int read_choosing(PyObject *tuple, Pulls *pulls, ExchangeMode *exchange_mode) {
    unsigned long long first, write_value, query_event, exchange;
    Py_ssize_t line_nbytes;
    int num_ranks, rank;
    if (!PyArg_ParseTuple(tuple, "KniiKKK", &first, &line_nbytes, &num_ranks, &rank, &write_value, &query_event,
                          &exchange))
        return -1;
    if (num_ranks < 1 || num_ranks > MAX_RANKS || rank < 0 || rank >= num_ranks ||
        line_nbytes < (Py_ssize_t)(sizeof(Line) + num_ranks * sizeof(uint32_t)))
        return PyErr_SetString(PyExc_ValueError, "no such rank, or lines too short"), -1;
    pulls->page = (Page){(char *)first, line_nbytes, num_ranks, rank};
    pulls->write_value = (WriteValue)write_value;
    pulls->query_event = (QueryEvent)query_event;
    *exchange_mode = (ExchangeMode)exchange;
    return 0;
}

static PyObject *issuer_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    unsigned long long set_current, wait_event, copy_batch, record_event, context;
    PyObject *failure;
    PyObject *choosing = Py_None;
    if (!PyArg_ParseTuple(arguments, "KKKKKO|O", &set_current, &wait_event, &copy_batch, &record_event, &context,
                          &failure, &choosing))
        return NULL;
    Pulls pulls = {
        .wait_event = (WaitEvent)wait_event,
        .copy_batch = (CopyBatch)copy_batch,
        .record_event = (RecordEvent)record_event,
    };
    ExchangeMode exchange_mode = NULL;
    if (choosing != Py_None && read_choosing(choosing, &pulls, &exchange_mode))
        return NULL;
    IssuerObject *self = PyObject_New(IssuerObject, type);
    if (!self)
        return NULL;
    self->issuer = (Issuer){
        .set_current = (SetCurrent)set_current,
        .wait_event = (WaitEvent)wait_event,
        .copy_batch = (CopyBatch)copy_batch,
        .record_event = (RecordEvent)record_event,
        .context = (void *)context,
        .pulls = pulls,
        .exchange_mode = exchange_mode,
    };
    self->failure = Py_NewRef(failure);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = start_issuer(&self->issuer);
    Py_END_ALLOW_THREADS
    self->running = !failed;
    if (failed) {
        errno = failed;
        PyErr_SetFromErrno(PyExc_OSError);
    } else if (self->issuer.start_result) {
        raise_failure(self->failure, self->issuer.start_call, self->issuer.start_result);
    } else {
        return (PyObject *)self;
    }
    Py_DECREF(self);
    return NULL;
}

static void close_thread(IssuerObject *self) {
    if (!self->running || !is_here(&self->issuer))
        return;
    self->running = 0;
    Py_BEGIN_ALLOW_THREADS
    end_issuer(&self->issuer);
    Py_END_ALLOW_THREADS
}

static void issuer_dealloc(PyObject *object) {
    IssuerObject *self = (IssuerObject *)object;
    close_thread(self);
    if (is_here(&self->issuer))
        destroy_locks(&self->issuer);
    Py_DECREF(self->failure);
    free_object(object);
}

static PyObject *issuer_submit(PyObject *object, PyObject *argument) {
    IssuerObject *self = (IssuerObject *)object;
    JobObject *submitted = (JobObject *)argument;
    if (!PyObject_TypeCheck(argument, job_type) || submitted->owner != self)
        return PyErr_SetString(PyExc_TypeError, "not a job of this issuer"), NULL;
    if (!check_here(self))
        return NULL;
    if (!can_be_handed_over(argument))
        return PyErr_SetString(PyExc_RuntimeError, self->running ? "submitted already" : "closed"), NULL;
    hand_over(argument);
    return Py_NewRef(Py_None);
}

static PyObject *issuer_flush(PyObject *object, PyObject *unused) {
    await((IssuerObject *)object, NULL);
    return Py_NewRef(Py_None);
}

static PyObject *issuer_close(PyObject *object, PyObject *unused) {
    close_thread((IssuerObject *)object);
    return Py_NewRef(Py_None);
}

static PyObject *issuer_id(PyObject *object, void *unused) {
    return PyLong_FromLong(((IssuerObject *)object)->issuer.id);
}

static PyObject *issuer_whole(PyObject *object, void *unused) {
    return PyBool_FromLong(((IssuerObject *)object)->issuer.gives_whole);
}

static int set_issuer_whole(PyObject *object, PyObject *value, void *unused) {
    const int gives_whole = value ? PyObject_IsTrue(value) : 0;
    if (gives_whole >= 0)
        ((IssuerObject *)object)->issuer.gives_whole = gives_whole;
    return gives_whole < 0 ? -1 : 0;
}

static PyObject *issuer_rate(PyObject *object, void *unused) {
    double ns_per_byte;
    __atomic_load(&((IssuerObject *)object)->issuer.pulls.ns_per_byte, &ns_per_byte, __ATOMIC_RELAXED);
    return PyFloat_FromDouble(ns_per_byte * 1e-9);
}

static PyMethodDef job_methods[] = {
    {"result", job_result, METH_NOARGS, "Wait until the driver was given everything, and raise what it refused."},
    {NULL},
};
static PyGetSetDef job_members[] = {
    {"done", job_done, NULL, "Whether the driver was given everything.", NULL},
    {"whole", job_whole, set_job_whole, "Whether nothing is chosen, though there are runs, when it is given next.", NULL},
    {NULL},
};
static PyType_Slot job_slots[] = {
    {Py_tp_methods, job_methods},
    {Py_tp_getset, job_members},
    {Py_tp_dealloc, job_dealloc},
    {0, NULL},
};
static PyType_Spec job_spec = {"vmm_dwdp.allocator._native.Job", sizeof(JobObject), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

static PyMethodDef issuer_methods[] = {
    {"job", issuer_job, METH_VARARGS, "Lanes, and what their addresses point into, as a job."},
    {"submit", issuer_submit, METH_O, "Append a job to what is to be done. It must stay alive until it is over."},
    {"flush", issuer_flush, METH_NOARGS, "Wait until all that was submitted was given to the driver, or refused by it."},
    {"close", issuer_close, METH_NOARGS, "Finish what was submitted, and end the thread."},
    {NULL},
};
static PyGetSetDef issuer_members[] = {
    {"native_id", issuer_id, NULL, "The thread's number in the kernel.", NULL},
    {"seconds_per_byte", issuer_rate, NULL, "Of a run that had the link to itself; 0 before one has ended.", NULL},
    {"whole", issuer_whole, set_issuer_whole, "Whether nothing is chosen of what is submitted.", NULL},
    {NULL},
};
static PyType_Slot issuer_slots[] = {
    {Py_tp_new, issuer_new},
    {Py_tp_methods, issuer_methods},
    {Py_tp_getset, issuer_members},
    {Py_tp_dealloc, issuer_dealloc},
    {0, NULL},
};
static PyType_Spec issuer_spec = {"vmm_dwdp.allocator._native.Issuer", sizeof(IssuerObject), 0, Py_TPFLAGS_DEFAULT,
                                  issuer_slots};

int is_job(PyObject *object) {
    return PyObject_TypeCheck(object, job_type);
}

int can_be_handed_over(PyObject *job) {
    const JobObject *self = (JobObject *)job;
    return is_here(&self->owner->issuer) && self->owner->running && job_state(&self->job) != SUBMITTED;
}

void hand_over(PyObject *job) {
    JobObject *self = (JobObject *)job;
    submit_job(&self->owner->issuer, &self->job);
}

int is_given(PyObject *job) {
    return job_state(&((JobObject *)job)->job) == DONE;
}

void await_given(PyObject *job) {
    await(((JobObject *)job)->owner, &((JobObject *)job)->job);
}

int add_issue_types(PyObject *module) {
    if ((errno = count_forks()))
        return PyErr_SetFromErrno(PyExc_OSError), -1;
    job_type = (PyTypeObject *)PyType_FromSpec(&job_spec);
    issuer_type = (PyTypeObject *)PyType_FromSpec(&issuer_spec);
    if (!job_type || !issuer_type || PyModule_AddObjectRef(module, "Job", (PyObject *)job_type))
        return -1;
    return PyModule_AddObjectRef(module, "Issuer", (PyObject *)issuer_type);
}
