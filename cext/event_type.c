/* vfiotool._mmio.Event: an eventfd that an interrupt signals, and waiting for it.
 *
 * In C because the wait is the whole of an interrupt's cost on our side. The descriptor is made by
 * vt_eventfd (so that its failing can be tested) and owned from then on.
 */
#include "module.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

#include "irq.h"
#include "mmio.h"

typedef struct {
	PyObject_HEAD
	int fd;
	int open;
	int closing; /* close was called while another thread waited */
	Py_ssize_t waiting;
	uint64_t generation;
} Event;

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int whole_ms(double seconds)
{
	double exact = seconds * 1000;
	int whole = (int)exact;

	return whole < exact ? whole + 1 : whole;
}

/* 0, or -1 with an exception set. `object` is a number of seconds, or None if `none` may be. */
static int take_seconds(PyObject *object, double *seconds, int *none)
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
		PyErr_SetString(PyExc_ValueError, "not a number of seconds");
		return -1;
	}
	if (*seconds < 0)
		*seconds = 0;
	return 0;
}

static int take_arguments(PyObject *const *arguments, Py_ssize_t count, PyObject *names,
			  double *timeout, int *endless, double *spin)
{
	Py_ssize_t named = names ? PyTuple_Size(names) : 0;

	*endless = 1;
	if (count > 1) {
		PyErr_SetString(PyExc_TypeError, "wait takes one positional argument: timeout_s");
		return -1;
	}
	if (count == 1 && take_seconds(arguments[0], timeout, endless))
		return -1;
	for (Py_ssize_t i = 0; i < named; i++) {
		PyObject *name = PyTuple_GetItem(names, i);
		int failed;

		if (!PyUnicode_CompareWithASCIIString(name, "spin_s")) {
			failed = take_seconds(arguments[count + i], spin, NULL);
		} else if (!PyUnicode_CompareWithASCIIString(name, "timeout_s") && !count) {
			failed = take_seconds(arguments[count + i], timeout, endless);
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
	if (self->closing && !self->waiting && self->open) {
		close(self->fd);
		self->fd = -1;
		self->open = 0;
	}
}

static PyObject *wait_for(Event *self, PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names)
{
	double timeout = 0, spin = 0, end = 0;
	uint64_t signals = 0, spin_ns;
	int endless, timeout_ms = -1, result;

	if (take_arguments(arguments, count, names, &timeout, &endless, &spin))
		return NULL;
	if (!self->open || self->closing)
		return vt_refuse((PyObject *)self, VT_CLOSED, 0, 0);
	if (self->generation != vt_fork_generation)
		return vt_refuse((PyObject *)self, VT_FORKED, 0, 0);
	if (!endless) {
		timeout_ms = timeout > 1e6 ? 1000000000 : whole_ms(timeout);
		end = timeout_ms ? now_s() + timeout : 0;
	}
	spin_ns = spin > 10 ? 10000000000u : (uint64_t)(spin * 1e9);
	for (;;) {
		self->waiting++;
		Py_BEGIN_ALLOW_THREADS
		result = vt_eventfd_wait(self->fd, timeout_ms, spin_ns, &signals);
		Py_END_ALLOW_THREADS
		self->waiting--;
		if (self->closing) {
			finish_closing(self);
			return vt_refuse((PyObject *)self, VT_CLOSED, 0, 0);
		}
		if (result > 0)
			return PyLong_FromUnsignedLongLong(signals);
		if (result == 0 && timeout_ms >= 0)
			return PyLong_FromLong(0);
		if (result != 0 && result != -EINTR) {
			errno = -result;
			return PyErr_SetFromErrno(PyExc_OSError);
		}
		if (PyErr_CheckSignals())
			return NULL;
		if (!endless) {
			double left = end - now_s();

			timeout_ms = left > 0 ? whole_ms(left) : 0;
		}
	}
}

static PyObject *close_event(Event *self, PyObject *unused)
{
	const uint64_t one = 1;

	(void)unused;
	if (!self->open || self->closing)
		Py_RETURN_NONE;
	self->closing = 1;
	/* Whoever waits is woken, and closes the descriptor itself: a number that is being waited
	 * for must not be given to another file. */
	if (self->waiting && write(self->fd, &one, sizeof(one)) < 0) {
		/* Full: then the waiter is awake anyway. */
	}
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
	release(self);
	Py_DECREF(type);
}

static PyMethodDef event_methods[] = {
	{ "wait", (PyCFunction)(void (*)(void))wait_for, METH_FASTCALL | METH_KEYWORDS,
	  "wait(timeout_s=None, *, spin_s=0.0): how often it fired, or 0 at the deadline." },
	{ "_close", (PyCFunction)(void (*)(void))close_event, METH_NOARGS, NULL },
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
	.name = "vfiotool._mmio.Event",
	.basicsize = sizeof(Event),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = event_slots,
};

int vt_add_event_type(PyObject *module)
{
	PyObject *type = PyType_FromSpec(&event_spec);
	int result = type ? PyModule_AddObjectRef(module, "Event", type) : -1;

	Py_XDECREF(type);
	return result;
}
