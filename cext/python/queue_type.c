/* vfiotool.native._types.QueueCalls: the calls of an NVMe queue pair that never wait long, made with the
 * interpreter's lock held.
 *
 * Letting go of the lock costs more than they take, and far more where several threads want it: each
 * of them gets it at every such call, and this one has to win it back. The functions are those of
 * vfiotool.native._library, which has nvme/nvme_queue.c; they come as addresses, and the queue pair
 * with the object that owns it.
 */
#include "python/queue_types.h"

/* With the interpreter's lock held no other thread runs: a look ends before one would notice. */
#define LOOK_NS_MAX 1000000u

int vt_take_number(PyObject *object, uint64_t limit, uint64_t *number)
{
	*number = PyLong_AsUnsignedLongLong(object);
	if (*number == UINT64_MAX && PyErr_Occurred())
		return -1;
	if (*number <= limit)
		return 0;
	PyErr_Format(PyExc_OverflowError, "%R is too large for a field of a command", object);
	return -1;
}

static PyObject *submit(QueueCalls *self, PyObject *const *arguments, Py_ssize_t count)
{
	static const uint64_t limits[] = { UINT8_MAX,  UINT32_MAX, UINT64_MAX, UINT32_MAX,
					   UINT64_MAX, UINT32_MAX, UINT16_MAX, UINT64_MAX };
	uint64_t values[sizeof(limits) / sizeof(*limits)];
	struct vt_nvme_io io;

	if (count != (Py_ssize_t)(sizeof(limits) / sizeof(*limits))) {
		PyErr_SetString(PyExc_TypeError, "submit takes 8 arguments");
		return NULL;
	}
	for (Py_ssize_t i = 0; i < count; i++)
		if (vt_take_number(arguments[i], limits[i], &values[i]))
			return NULL;
	io = (struct vt_nvme_io){
		.opcode = (uint8_t)values[0],
		.nsid = (uint32_t)values[1],
		.lba = values[2],
		.blocks = (uint32_t)values[3],
		.iova = values[4],
		.bytes = (uint32_t)values[5],
		.control = (uint16_t)values[6],
		.tag = values[7],
	};
	return PyLong_FromLong(self->submit(self->queue, &io, 1));
}

static PyObject *look(QueueCalls *self, PyObject *const *arguments, Py_ssize_t count)
{
	uint64_t wait_ns = 0;

	if (count > 1) {
		PyErr_SetString(PyExc_TypeError, "look takes 1 argument at most");
		return NULL;
	}
	if (count && vt_take_number(arguments[0], LOOK_NS_MAX, &wait_ns))
		return NULL;
	return PyLong_FromLong(self->poll(self->queue, self->done, self->room, wait_ns != 0,
					  wait_ns, self->held));
}

static int calls_init(QueueCalls *self, PyObject *arguments, PyObject *keywords)
{
	unsigned long long queue, send, poll, done, held;
	PyObject *owners;
	unsigned room;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "QueueCalls takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "KKKKKIO", &queue, &send, &poll, &done, &held, &room,
			      &owners))
		return -1;
	if (self->owners || !queue || !send || !poll || !done || !held) {
		PyErr_SetString(PyExc_ValueError, "QueueCalls has one queue pair and its functions");
		return -1;
	}
	self->queue = (struct vt_nvme_queue *)(uintptr_t)queue;
	self->submit = (vt_submit_function *)(uintptr_t)send;
	self->poll = (vt_poll_function *)(uintptr_t)poll;
	self->done = (struct vt_nvme_done *)(uintptr_t)done;
	self->held = (uint32_t *)(uintptr_t)held;
	self->room = room;
	self->owners = Py_NewRef(owners);
	return 0;
}

static void calls_dealloc(QueueCalls *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	Py_XDECREF(self->owners);
	release(self);
	Py_DECREF(type);
}

QueueCalls *vt_as_queue_calls(PyObject *object)
{
	if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)calls_dealloc &&
	    ((QueueCalls *)object)->owners)
		return (QueueCalls *)object;
	PyErr_SetString(PyExc_TypeError, "no QueueCalls");
	return NULL;
}

static PyMethodDef calls_methods[] = {
	{ "submit", (PyCFunction)(void (*)(void))submit, METH_FASTCALL,
	  "submit($self, opcode, nsid, lba, blocks, iova, size_bytes, control, tag, /)\n--\n\n"
	  "vt_nvme_submit of one command: 1, 0 where the queue is full, or a negative errno. Raises\n"
	  "OverflowError for a number that its field cannot hold." },
	{ "look", (PyCFunction)(void (*)(void))look, METH_FASTCALL,
	  "look($self, wait_ns=0, /)\n--\n\n"
	  "vt_nvme_poll of what is there, or until there is something for at most `wait_ns`\n"
	  "nanoseconds, a millisecond at most: how many completions it took, or a negative errno." },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot calls_slots[] = {
	{ Py_tp_doc,
	  (void *)"QueueCalls(queue, submit, poll, done, held, room, owners)\n--\n\n"
		  "The calls of a queue pair that never wait long, made with the interpreter's lock held:\n"
		  "addresses of the queue pair, of vt_nvme_submit and vt_nvme_poll, of the `room`\n"
		  "completions that there is place for and their count. `owners` are kept." },
	{ Py_tp_init, (void *)calls_init },
	{ Py_tp_dealloc, (void *)calls_dealloc },
	{ Py_tp_methods, calls_methods },
	{ 0, NULL },
};

static PyType_Spec calls_spec = {
	.name = "vfiotool.native._types.QueueCalls",
	.basicsize = sizeof(QueueCalls),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = calls_slots,
};

int vt_add_queue_type(PyObject *module)
{
	return vt_add_type(module, "QueueCalls", &calls_spec);
}
