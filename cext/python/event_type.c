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

#include "vfio/irq.h"
#include "vfio/mmio.h"
#include "vfio/uapi_compat.h"

#define LONGEST_S 1e6 /* eleven days */

typedef struct {
	PyObject_HEAD
	int fd;
	int open;
	int closing; /* close was called while another thread waited */
	Py_ssize_t waiting;
	uint64_t generation;
	int device; /* -1: no interrupt of a device's */
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

/* 0, or -1 with an exception set: it is off, or this is a child. */
static int refuse_unusable(Event *self)
{
	if (self->open && !self->closing && self->generation == vt_fork_generation)
		return 0;
	vt_refuse((PyObject *)self, self->open && !self->closing ? VT_FORKED : VT_CLOSED, 0, 0);
	return -1;
}

/* One wait with the interpreter's lock released, and the Unix signals that came meanwhile. As
 * vt_eventfd_wait, but -1 is an exception that has been set. */
static int block_once(Event *self, int64_t *left_ns, uint64_t spin_ns, uint64_t *signals)
{
	int result;

	self->waiting++;
	Py_BEGIN_ALLOW_THREADS
	result = vt_eventfd_wait(self->fd, left_ns, spin_ns, signals);
	Py_END_ALLOW_THREADS
	self->waiting--;
	if (self->closing) {
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
		errno = -result;
		PyErr_SetFromErrno(PyExc_OSError);
		return -1;
	}
	return result;
}

static PyObject *wait_for(Event *self, PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names)
{
	double timeout = 0, spin = 0;
	uint64_t signals = 0, spin_ns;
	int64_t left_ns = -1;
	int endless, result;

	if (take_arguments(arguments, count, names, &timeout, &endless, &spin) ||
	    refuse_unusable(self))
		return NULL;
	if (!endless)
		left_ns = timeout > LONGEST_S ? (int64_t)(LONGEST_S * 1e9) : (int64_t)(timeout * 1e9);
	spin_ns = spin > 10 ? 10000000000u : (uint64_t)(spin * 1e9);
	/* Often it has fired already: then this is the only call into the kernel. */
	result = vt_eventfd_take(self->fd, &signals);
	if (result < 0) {
		errno = -result;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	while (!result && (left_ns || spin_ns)) {
		result = block_once(self, &left_ns, spin_ns, &signals);
		spin_ns = 0;
	}
	return result < 0 ? NULL : PyLong_FromUnsignedLongLong(signals);
}

static PyObject *arm(Event *self, PyObject *arguments)
{
	if (!PyArg_ParseTuple(arguments, "iIIp", &self->device, &self->index, &self->vector,
			      &self->maskable))
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *act(Event *self, const char *verb, uint32_t action)
{
	int result = -EOPNOTSUPP;

	if (refuse_unusable(self))
		return NULL;
	/* The lock stays held: otherwise another thread could close the device under the call. */
	if (self->device >= 0 && (self->maskable || action == VT_IRQ_TRIGGER))
		result = vt_irq_action(self->device, self->index, self->vector, 1, action);
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
	self->device = -1;
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
	{ "trigger", (PyCFunction)(void (*)(void))trigger, METH_NOARGS,
	  "Let the kernel signal it as if the device had: a self-test without hardware." },
	{ "mask", (PyCFunction)(void (*)(void))mask, METH_NOARGS, "Hold it back (INTx)." },
	{ "unmask", (PyCFunction)(void (*)(void))unmask, METH_NOARGS,
	  "Let it through again. INTx is masked by the kernel whenever it fires: acknowledge the\n"
	  "device first, then unmask." },
	{ "_arm", (PyCFunction)(void (*)(void))arm, METH_VARARGS, NULL },
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
	.name = "vfiotool.native._types.Event",
	.basicsize = sizeof(Event),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = event_slots,
};

int vt_add_event_type(PyObject *module)
{
	return vt_add_type(module, "Event", &event_spec);
}
