/* vfiotool.native._types.Window: a mapped part of a region, and the accesses to it.
 *
 * One register access through cffi costs about 100 ns, and the check of its result in Python half
 * as much again; a method of a C type costs 20.
 */
#include "python/module.h"

#include <errno.h>
#include <time.h>

#include "vfio/mmio.h"

#define POLL_SLICE_NS 50000000u

typedef struct {
	PyObject_HEAD
	struct vt_window window;
	Py_ssize_t polling;
	Py_ssize_t pins;
	int closing; /* somebody waits at the gate to unmap it */
} Window;

static PyObject *refuse(Window *self, int reason, uint64_t offset, unsigned width)
{
	return vt_refuse((PyObject *)self, reason, offset, width);
}

static PyObject *refuse_access(Window *self, uint64_t offset, uint64_t count, unsigned width,
			       uint32_t access)
{
	int reason = vt_window_check(&self->window, offset, count, width, access);

	if (self->closing)
		reason = VT_CLOSED;
	return refuse(self, reason ? reason : VT_RANGE, offset, width);
}

/* 0, or -1 with an exception set. A number that is no 64-bit offset is out of range. */
static int take_number(PyObject *object, uint64_t *number, int *overflow)
{
	unsigned long long value = PyLong_AsUnsignedLongLong(object);

	*overflow = 0;
	if (value == (unsigned long long)-1 && PyErr_Occurred()) {
		if (!PyErr_ExceptionMatches(PyExc_OverflowError))
			return -1;
		PyErr_Clear();
		*overflow = 1;
		value = UINT64_MAX;
	}
	*number = value;
	return 0;
}

static int take_count(Py_ssize_t given, Py_ssize_t wanted, const char *what)
{
	if (given == wanted)
		return 0;
	PyErr_Format(PyExc_TypeError, "%s takes %zd arguments (%zd given)", what, wanted, given);
	return -1;
}

#define READ_METHOD(bits)                                                                          \
	static PyObject *read##bits(Window *self, PyObject *argument)                              \
	{                                                                                          \
		uint64_t offset;                                                                   \
		int overflow;                                                                      \
                                                                                                   \
		if (take_number(argument, &offset, &overflow))                                     \
			return NULL;                                                               \
		if (!vt_window_allows(&self->window, offset, bits / 8, VT_WINDOW_READ))            \
			return refuse_access(self, offset, 1, bits / 8, VT_WINDOW_READ);           \
		return PyLong_FromUnsignedLongLong(vt_load##bits(&self->window, offset));          \
	}

#define WRITE_METHOD(bits)                                                                         \
	static PyObject *write##bits(Window *self, PyObject *const *arguments, Py_ssize_t count)   \
	{                                                                                          \
		uint64_t offset, value;                                                            \
		int overflow;                                                                      \
                                                                                                   \
		if (take_count(count, 2, "write" #bits) ||                                         \
		    take_number(arguments[0], &offset, &overflow))                                 \
			return NULL;                                                               \
		if (!vt_window_allows(&self->window, offset, bits / 8, VT_WINDOW_WRITE))           \
			return refuse_access(self, offset, 1, bits / 8, VT_WINDOW_WRITE);          \
		if (take_number(arguments[1], &value, &overflow))                                  \
			return NULL;                                                               \
		if (overflow || value != (uint##bits##_t)value)                                    \
			return refuse(self, VT_BAD_VALUE, offset, bits / 8);                       \
		vt_store##bits(&self->window, offset, (uint##bits##_t)value);                      \
		Py_RETURN_NONE;                                                                    \
	}

READ_METHOD(8)
READ_METHOD(16)
READ_METHOD(32)
READ_METHOD(64)
WRITE_METHOD(8)
WRITE_METHOD(16)
WRITE_METHOD(32)
WRITE_METHOD(64)

static int valid_width(unsigned width)
{
	if (width == 1 || width == 2 || width == 4 || width == 8)
		return 1;
	PyErr_SetString(PyExc_ValueError, "the width of an access is 1, 2, 4 or 8 bytes");
	return 0;
}

/* The common part of read_into and write_from: what moves between a buffer and the window. */
static PyObject *move(Window *self, PyObject *arguments, int writing)
{
	unsigned long long offset;
	PyObject *object;
	Py_buffer buffer;
	unsigned width;
	uint64_t count;
	uint32_t access = writing ? VT_WINDOW_WRITE : VT_WINDOW_READ;
	int fifo, reason;

	if (!PyArg_ParseTuple(arguments, "KOIp", &offset, &object, &width, &fifo) ||
	    !valid_width(width))
		return NULL;
	if (PyObject_GetBuffer(object, &buffer, writing ? PyBUF_SIMPLE : PyBUF_WRITABLE))
		return NULL;
	count = (uint64_t)buffer.len / width;
	if (count * width != (uint64_t)buffer.len) {
		PyBuffer_Release(&buffer);
		return refuse(self, VT_ALIGN, offset, width);
	}
	reason = vt_window_check(&self->window, offset, fifo ? 1 : count, width, access);
	if (reason) {
		PyBuffer_Release(&buffer);
		return refuse(self, reason, offset, width);
	}
	/* The lock stays held: otherwise another thread could close the window under the copy. */
	if (writing)
		vt_window_write_many(&self->window, offset, width, !fifo, buffer.buf, count);
	else
		vt_window_read_many(&self->window, offset, width, !fifo, buffer.buf, count);
	PyBuffer_Release(&buffer);
	Py_RETURN_NONE;
}

static PyObject *read_into(Window *self, PyObject *arguments)
{
	return move(self, arguments, 0);
}

static PyObject *write_from(Window *self, PyObject *arguments)
{
	return move(self, arguments, 1);
}

static PyObject *poll_until(Window *self, PyObject *arguments)
{
	unsigned long long offset, mask, wanted, timeout_ns;
	uint64_t value = 0;
	unsigned width;
	int found = 0;

	if (!PyArg_ParseTuple(arguments, "KIKKK", &offset, &width, &mask, &wanted, &timeout_ns) ||
	    !valid_width(width))
		return NULL;
	/* In slices, so that a signal (Ctrl-C) is noticed. The window stays mapped while the lock
	 * is released: whoever blocks or closes it waits at the gate. */
	for (;;) {
		uint64_t slice = timeout_ns < POLL_SLICE_NS ? timeout_ns : POLL_SLICE_NS;

		if (!vt_window_allows(&self->window, offset, width, VT_WINDOW_READ))
			return refuse_access(self, offset, 1, width, VT_WINDOW_READ);
		self->polling++;
		Py_BEGIN_ALLOW_THREADS
		found = vt_window_poll(&self->window, offset, width, mask, wanted, slice, &value);
		Py_END_ALLOW_THREADS
		self->polling--;
		if (found < 0)
			return refuse(self, self->closing ? VT_CLOSED : VT_BLOCKED, offset, width);
		timeout_ns -= slice;
		if (found || !timeout_ns)
			break;
		if (PyErr_CheckSignals())
			return NULL;
	}
	return Py_BuildValue("(NK)", PyBool_FromLong(found), (unsigned long long)value);
}

static PyObject *address(Window *self, PyObject *arguments)
{
	unsigned long long offset, length;
	uint32_t access = self->window.granted;
	int reason;

	if (!PyArg_ParseTuple(arguments, "KK", &offset, &length))
		return NULL;
	reason = vt_window_check(&self->window, offset, length, 1, access ? access : 1);
	if (reason)
		return refuse(self, reason, offset, 1);
	return PyLong_FromUnsignedLongLong((uintptr_t)self->window.base +
					   (offset - self->window.start));
}

/* Until no thread is beyond the gate, which is shut; the lock is released meanwhile. */
static void wait_at_gate(Window *self)
{
	const struct timespec pause = { .tv_nsec = 20000 };

	while (self->window.generation == vt_fork_generation &&
	       vt_gate_is_busy(&self->window.gate)) {
		Py_BEGIN_ALLOW_THREADS
		nanosleep(&pause, NULL);
		Py_END_ALLOW_THREADS
	}
}

static PyObject *block(Window *self, PyObject *blocked)
{
	int truth = PyObject_IsTrue(blocked);

	if (truth < 0)
		return NULL;
	if (self->closing)
		truth = 1;
	vt_window_block(&self->window, truth);
	if (truth)
		wait_at_gate(self);
	Py_RETURN_NONE;
}

static PyObject *pin(Window *self, PyObject *unused)
{
	int reason = self->window.reserved && !self->closing ? VT_FORKED : VT_CLOSED;

	(void)unused;
	if (reason == VT_CLOSED || self->window.generation != vt_fork_generation)
		return refuse(self, reason, self->window.start, 0);
	self->pins++;
	return PyLong_FromUnsignedLongLong((uintptr_t)&self->window.gate);
}

static PyObject *unpin(Window *self, PyObject *unused)
{
	(void)unused;
	if (self->pins <= 0) {
		PyErr_SetString(PyExc_RuntimeError, "the window is not pinned");
		return NULL;
	}
	self->pins--;
	Py_RETURN_NONE;
}

static PyObject *close_window(Window *self, PyObject *arguments)
{
	int even_pinned = 0;

	if (!PyArg_ParseTuple(arguments, "|p", &even_pinned))
		return NULL;
	if (!self->window.reserved)
		Py_RETURN_NONE;
	if (self->pins && !even_pinned)
		return refuse(self, VT_WINDOW_PINNED, self->window.start, 0);
	self->closing = 1;
	vt_window_block(&self->window, 1);
	wait_at_gate(self);
	/* In a child the range was never inherited; whatever lies there now is not ours. */
	if (self->window.generation == vt_fork_generation)
		vt_window_unmap(&self->window);
	Py_RETURN_NONE;
}

static PyObject *is_closed(Window *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(!self->window.reserved);
}

static PyObject *get_polling(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromSsize_t(self->polling);
}

static PyObject *get_pins(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromSsize_t(self->pins);
}

static PyObject *get_start(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->window.start);
}

static PyObject *get_size(Window *self, void *unused)
{
	(void)unused;
	return PyLong_FromUnsignedLongLong(self->window.size);
}

static int window_init(Window *self, PyObject *arguments, PyObject *keywords)
{
	unsigned long long position, start, size, alignment;
	unsigned access;
	int fd, result;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "Window takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "iKKKIK", &fd, &position, &start, &size, &access,
			      &alignment))
		return -1;
	if (self->window.reserved) {
		PyErr_SetString(PyExc_RuntimeError, "a Window is mapped once");
		return -1;
	}
	result = vt_window_map(&self->window, fd, position, start, size, access, alignment);
	if (result) {
		errno = -result;
		PyErr_SetFromErrno(PyExc_OSError);
		return -1;
	}
	return 0;
}

static void window_dealloc(Window *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	if (self->window.generation == vt_fork_generation)
		vt_window_unmap(&self->window);
	release(self);
	Py_DECREF(type);
}

#define METHOD(name, flags, text) { #name, (PyCFunction)(void (*)(void))name, flags, text }
#define READS(bits)                                                                                \
	METHOD(read##bits, METH_O,                                                                 \
	       "read" #bits "($self, offset, /)\n--\n\n"                                           \
	       "The register of " #bits                                                            \
	       " bits at `offset` bytes from the region's start, in one\n"                         \
	       "load, followed by a read barrier. Raises UsageError for what cannot be accessed.")
#define WRITES(bits)                                                                               \
	METHOD(write##bits, METH_FASTCALL,                                                         \
	       "write" #bits "($self, offset, value, /)\n--\n\n"                                   \
	       "Store the register of " #bits                                                      \
	       " bits at `offset` bytes from the region's start, in\n"                             \
	       "one store, preceded by a write barrier. Raises UsageError for what cannot be\n"    \
	       "accessed and for a value that does not fit.")

static PyMethodDef window_methods[] = {
	READS(8),
	READS(16),
	READS(32),
	READS(64),
	WRITES(8),
	WRITES(16),
	WRITES(32),
	WRITES(64),
	{ "_read_into", (PyCFunction)read_into, METH_VARARGS,
	  "_read_into(offset, buffer, width, fifo): fill the buffer with registers." },
	{ "_write_from", (PyCFunction)write_from, METH_VARARGS,
	  "_write_from(offset, buffer, width, fifo): store the buffer into registers." },
	{ "_poll_until", (PyCFunction)poll_until, METH_VARARGS,
	  "_poll_until(offset, width, mask, wanted, timeout_ns): (found, value). Ends with UsageError\n"
	  "when the window is blocked or closed meanwhile." },
	METHOD(address, METH_VARARGS,
	       "address($self, offset, length, /)\n--\n\n"
	       "Where `length` bytes at `offset` lie in this process. Pin the window for as long as\n"
	       "anything keeps the number, and pass the gate before each access."),
	METHOD(pin, METH_NOARGS,
	       "pin($self, /)\n--\n\n"
	       "Keep the window mapped for C that keeps an address of it; returns the address of the\n"
	       "window's gate (cext/vfio/gate.h), valid for as long as this object lives: keep a\n"
	       "reference. C enters the gate before it touches the window, asks in each round of a\n"
	       "loop whether it is still open, and leaves; a gate that is shut is to be told as\n"
	       "UsageError (`refuse_access`). Closing a pinned window raises UsageError; closing its\n"
	       "device shuts the gate, waits for those inside, and unmaps all the same. Raises\n"
	       "UsageError once the window is closed, and in a child process."),
	METHOD(unpin, METH_NOARGS,
	       "unpin($self, /)\n--\n\n"
	       "The counterpart of one `pin`. Allowed after the window was closed with its device."),
	{ "_block", (PyCFunction)block, METH_O,
	  "_block(blocked): refuse accesses, or allow them again. Returns when no loop in C is at it." },
	{ "_close", (PyCFunction)close_window, METH_VARARGS,
	  "_close(even_pinned=False): end polls with UsageError, wait for them, unmap." },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef window_attributes[] = {
	{ "closed", (getter)is_closed, NULL, "Whether it was closed.", NULL },
	{ "polling", (getter)get_polling, NULL, "How many threads poll a register now.", NULL },
	{ "pins", (getter)get_pins, NULL, "How often `pin` was called without its `unpin`.", NULL },
	{ "start", (getter)get_start, NULL, "The offset of its first byte in the region.", NULL },
	{ "size", (getter)get_size, NULL, "Its bytes; 0 once it is closed.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot window_slots[] = {
	{ Py_tp_doc,
	  (void *)"A mapped part of a region: accesses of exact width, bounds checked." },
	{ Py_tp_init, (void *)window_init },
	{ Py_tp_dealloc, (void *)window_dealloc },
	{ Py_tp_methods, window_methods },
	{ Py_tp_getset, window_attributes },
	{ 0, NULL },
};

static PyType_Spec window_spec = {
	.name = "vfiotool.native._types.Window",
	.basicsize = sizeof(Window),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = window_slots,
};

int vt_add_window_type(PyObject *module)
{
	return vt_add_type(module, "Window", &window_spec);
}
