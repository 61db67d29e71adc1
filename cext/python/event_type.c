/* vfiotool.native._types.Event: an eventfd that an interrupt signals, and waiting for it.
 *
 * In C because the wait is the whole of an interrupt's cost on our side; so are the trigger of a
 * self-test and the unmasking that each INTx needs. The descriptor is made by vt_eventfd and owned
 * from then on.
 */
#include "python/module.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "vfio/interrupt.h"
#include "vfio/mmio.h"
#include "vfio/uapi_compat.h"

#define LONGEST_S 1e6 /* eleven days */
/* The eventfd counts firings in its low half. A waiter that took them while others wait passes them
 * on by adding ECHO, which wakes one more and is no firing. */
#define ECHO ((uint64_t)1 << 32)

/* A thread that waits; `start` is what had fired before it began. */
struct waiter {
	uint64_t start;
	struct waiter *next;
};

typedef struct {
	PyObject_HEAD
	int fd;
	int open;
	int closing;    /* close was called while others waited */
	uint64_t fired; /* all that was ever taken from the eventfd */
	struct waiter *waiters;
	int watched; /* an event loop looks at the descriptor */
	uint64_t watch_start;
	uint64_t generation;
	PyObject *device; /* the Handle of the device, or NULL */
	unsigned index, vector;
	int maskable;
} Event;

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* 0, or -1 with an exception set. `object` is a number of seconds, or None if `none` may be. */
static int take_seconds(PyObject *self, PyObject *object, double *seconds, int *none)
{
	if (none && object == Py_None) {
		*none = 1;
		return 0;
	}
	if (none)
		*none = 0;
	*seconds = PyFloat_AsDouble(object);
	if (*seconds == -1.0 && PyErr_Occurred())
		return -1;
	if (*seconds != *seconds) {
		vt_refuse(self, VT_BAD_TIME, 0, 0);
		return -1;
	}
	if (*seconds < 0)
		*seconds = 0;
	return 0;
}

static int take_arguments(PyObject *self, PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names, double *timeout, int *endless, double *spin)
{
	Py_ssize_t named = names ? PyTuple_Size(names) : 0;

	*endless = 1;
	if (count > 1) {
		PyErr_SetString(PyExc_TypeError, "wait takes one positional argument: timeout_s");
		return -1;
	}
	if (count == 1 && take_seconds(self, arguments[0], timeout, endless))
		return -1;
	for (Py_ssize_t i = 0; i < named; i++) {
		PyObject *name = PyTuple_GetItem(names, i);
		int failed;

		if (!PyUnicode_CompareWithASCIIString(name, "spin_s")) {
			failed = take_seconds(self, arguments[count + i], spin, NULL);
		} else if (!PyUnicode_CompareWithASCIIString(name, "timeout_s") && !count) {
			failed = take_seconds(self, arguments[count + i], timeout, endless);
		} else {
			PyErr_Format(PyExc_TypeError, "wait has no argument %R", name);
			return -1;
		}
		if (failed)
			return -1;
	}
	return 0;
}

static void finish_closing(Event *self)
{
	if (self->closing && !self->waiters && !self->watched && self->open) {
		close(self->fd);
		self->fd = -1;
		self->open = 0;
	}
}

/* Makes the descriptor readable. If the counter is full it is so already. */
static void signal_one(const Event *self, uint64_t value)
{
	ssize_t done = write(self->fd, &value, sizeof(value));

	(void)done;
}

static int others_missed(const Event *self)
{
	if (self->watched && self->watch_start != self->fired)
		return 1;
	for (const struct waiter *one = self->waiters; one; one = one->next)
		if (one->start != self->fired)
			return 1;
	return 0;
}

/* Counts what was taken from the eventfd, and wakes the next of those who wait for it too. */
static void account(Event *self, uint64_t taken)
{
	self->fired += taken & (ECHO - 1);
	if (others_missed(self))
		signal_one(self, ECHO);
}

static void leave_queue(Event *self, const struct waiter *me)
{
	struct waiter **place = &self->waiters;

	while (*place && *place != me)
		place = &(*place)->next;
	if (*place)
		*place = me->next;
}

/* 0, or -1 with an exception set: it is off, or this is a child. */
static int refuse_unusable(Event *self)
{
	if (self->open && !self->closing && self->generation == vt_fork_generation)
		return 0;
	vt_refuse((PyObject *)self, self->open && !self->closing ? VT_FORKED : VT_CLOSED, 0, 0);
	return -1;
}

static PyObject *os_error(int result)
{
	errno = -result;
	return PyErr_SetFromErrno(PyExc_OSError);
}

/* One wait with the interpreter's lock released, and the Unix signals that came meanwhile. 0, or -1
 * with an exception set; what fired is in self->fired. */
static int block_once(Event *self, uint64_t start, int64_t *left_ns, uint64_t spin_ns)
{
	struct waiter me = { .start = start, .next = self->waiters };
	uint64_t signals = 0;
	int result;

	self->waiters = &me;
	Py_BEGIN_ALLOW_THREADS
	result = vt_eventfd_wait(self->fd, left_ns, spin_ns, &signals);
	Py_END_ALLOW_THREADS
	leave_queue(self, &me);
	if (self->closing) {
		/* Each that leaves wakes the next. */
		if (self->waiters)
			signal_one(self, 1);
		finish_closing(self);
		vt_refuse((PyObject *)self, VT_CLOSED, 0, 0);
		return -1;
	}
	if (result == -EINTR) {
		double end = now_s() + (double)*left_ns / 1e9;

		if (PyErr_CheckSignals())
			return -1;
		/* What the handlers took belongs to the time that the wait was given. */
		if (*left_ns > 0)
			*left_ns = end > now_s() ? (int64_t)((end - now_s()) * 1e9) : 0;
		return 0;
	}
	if (result < 0) {
		os_error(result);
		return -1;
	}
	if (result > 0)
		account(self, signals);
	if (result > 0 && start == self->fired && others_missed(self)) {
		/* It woke the wrong one: let those run for whom it was. */
		const struct timespec pause = { .tv_nsec = 20000 };

		Py_BEGIN_ALLOW_THREADS
		nanosleep(&pause, NULL);
		Py_END_ALLOW_THREADS
	}
	return 0;
}

static PyObject *wait_for(Event *self, PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names)
{
	double timeout = 0, spin = 0;
	uint64_t start = self->fired, signals = 0, spin_ns;
	int64_t left_ns = -1;
	int endless, result;

	if (take_arguments((PyObject *)self, arguments, count, names, &timeout, &endless, &spin) ||
	    refuse_unusable(self))
		return NULL;
	if (!endless)
		left_ns = timeout > LONGEST_S ? (int64_t)(LONGEST_S * 1e9) :
						(int64_t)(timeout * 1e9);
	spin_ns = spin > 10 ? 10000000000u : (uint64_t)(spin * 1e9);
	/* Often it has fired already: then this is the only call into the kernel. */
	result = vt_eventfd_take(self->fd, &signals);
	if (result < 0)
		return os_error(result);
	if (result)
		account(self, signals);
	while (self->fired == start && (left_ns || spin_ns)) {
		if (block_once(self, start, &left_ns, spin_ns))
			return NULL;
		/* A handler of a Unix signal may have closed it. */
		if (self->fired == start && refuse_unusable(self))
			return NULL;
		spin_ns = 0;
	}
	return PyLong_FromUnsignedLongLong(self->fired - start);
}

static PyObject *watch(Event *self, PyObject *unused)
{
	(void)unused;
	if (refuse_unusable(self))
		return NULL;
	if (self->watched) {
		PyErr_SetString(PyExc_RuntimeError, "an event loop watches it already");
		return NULL;
	}
	self->watched = 1;
	self->watch_start = self->fired;
	return PyLong_FromUnsignedLongLong(self->fired);
}

static PyObject *collect(Event *self, PyObject *unused)
{
	uint64_t signals = 0;
	int result;

	(void)unused;
	if (refuse_unusable(self))
		return NULL;
	result = vt_eventfd_take(self->fd, &signals);
	if (result < 0)
		return os_error(result);
	self->watch_start = self->fired + (signals & (ECHO - 1));
	if (result)
		account(self, signals);
	return PyLong_FromUnsignedLongLong(self->fired);
}

static PyObject *unwatch(Event *self, PyObject *unused)
{
	(void)unused;
	self->watched = 0;
	finish_closing(self);
	Py_RETURN_NONE;
}

static PyObject *arm(Event *self, PyObject *arguments)
{
	PyObject *device;

	if (!PyArg_ParseTuple(arguments, "OIIp", &device, &self->index, &self->vector,
			      &self->maskable))
		return NULL;
	Py_XDECREF(self->device);
	self->device = Py_NewRef(device);
	Py_RETURN_NONE;
}

static PyObject *act(Event *self, const char *verb, uint32_t action)
{
	int device, result = -EOPNOTSUPP;

	if (refuse_unusable(self))
		return NULL;
	if (self->device && (self->maskable || action == VT_IRQ_TRIGGER)) {
		device = vt_handle_take(self->device);
		if (device < 0)
			return vt_refuse((PyObject *)self, VT_CLOSED, 0, 0);
		/* The lock stays held: it costs more to let go of than this takes. */
		result = vt_irq_action(device, self->index, self->vector, 1, action);
		vt_handle_give(self->device);
	}
	if (result < 0)
		return PyObject_CallMethod((PyObject *)self, "_refused", "si", verb, result);
	Py_RETURN_NONE;
}

static PyObject *trigger(Event *self, PyObject *unused)
{
	(void)unused;
	return act(self, "trigger", VT_IRQ_TRIGGER);
}

static PyObject *mask(Event *self, PyObject *unused)
{
	(void)unused;
	return act(self, "mask", VT_IRQ_MASK);
}

static PyObject *unmask(Event *self, PyObject *unused)
{
	(void)unused;
	return act(self, "unmask", VT_IRQ_UNMASK);
}

static PyObject *close_event(Event *self, PyObject *unused)
{
	(void)unused;
	if (!self->open || self->closing)
		Py_RETURN_NONE;
	self->closing = 1;
	/* Whoever waits is woken, and the last one closes the descriptor: a number that is being
	 * waited for must not be given to another file. */
	if (self->waiters)
		signal_one(self, 1);
	finish_closing(self);
	Py_RETURN_NONE;
}

static PyObject *get_descriptor(Event *self, void *unused)
{
	(void)unused;
	return PyLong_FromLong(self->open && !self->closing ? self->fd : -1);
}

static int event_init(Event *self, PyObject *arguments, PyObject *keywords)
{
	int fd;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "Event takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "i", &fd))
		return -1;
	if (self->open) {
		PyErr_SetString(PyExc_RuntimeError, "an Event has one descriptor");
		return -1;
	}
	self->fd = fd;
	self->open = 1;
	self->generation = vt_fork_generation;
	return 0;
}

static void event_dealloc(Event *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	if (self->open)
		close(self->fd);
	Py_XDECREF(self->device);
	release(self);
	Py_DECREF(type);
}

static PyMethodDef event_methods[] = {
	{ "wait", (PyCFunction)(void (*)(void))wait_for, METH_FASTCALL | METH_KEYWORDS,
	  "wait($self, timeout_s=None, *, spin_s=0.0)\n--\n\n"
	  "How often it has fired since the last wait, or since this one began where several wait at\n"
	  "once: each of them is woken. 0 at the deadline; None and inf wait without limit, less than\n"
	  "0 is 0. Raises UsageError for NaN, and once it is closed, also meanwhile." },
	{ "trigger", (PyCFunction)(void (*)(void))trigger, METH_NOARGS,
	  "trigger($self, /)\n--\n\n"
	  "Let the kernel signal it as if the device had: a self-test without hardware." },
	{ "mask", (PyCFunction)(void (*)(void))mask, METH_NOARGS,
	  "mask($self, /)\n--\n\nHold it back (INTx)." },
	{ "unmask", (PyCFunction)(void (*)(void))unmask, METH_NOARGS,
	  "unmask($self, /)\n--\n\n"
	  "Let it through again. INTx is masked by the kernel whenever it fires: acknowledge the\n"
	  "device first, then unmask." },
	{ "_arm", (PyCFunction)(void (*)(void))arm, METH_VARARGS,
	  "_arm(device, index, vector, maskable): what trigger, mask and unmask act on." },
	{ "_watch", (PyCFunction)(void (*)(void))watch, METH_NOARGS,
	  "_watch(): an event loop waits for the descriptor from now on; what has fired so far." },
	{ "_collect", (PyCFunction)(void (*)(void))collect, METH_NOARGS,
	  "_collect(): for the event loop: take what has fired; the sum of all that ever did." },
	{ "_unwatch", (PyCFunction)(void (*)(void))unwatch, METH_NOARGS,
	  "_unwatch(): the event loop has let go of the descriptor." },
	{ "_close", (PyCFunction)(void (*)(void))close_event, METH_NOARGS,
	  "_close(): wake all who wait with UsageError; the last one closes the descriptor." },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef event_attributes[] = {
	{ "descriptor", (getter)(void (*)(void))get_descriptor, NULL,
	  "The eventfd; -1 once it is closed.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot event_slots[] = {
	{ Py_tp_doc, (void *)"An eventfd that an interrupt signals." },
	{ Py_tp_init, (void *)event_init },
	{ Py_tp_dealloc, (void *)event_dealloc },
	{ Py_tp_methods, event_methods },
	{ Py_tp_getset, event_attributes },
	{ 0, NULL },
};

static PyType_Spec event_spec = {
	.name = "vfiotool.native._types.Event",
	.basicsize = sizeof(Event),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = event_slots,
};

int vt_add_event_type(PyObject *module)
{
	return vt_add_type(module, "Event", &event_spec);
}
