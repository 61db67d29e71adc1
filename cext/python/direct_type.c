/* vfiotool.native._types.DirectQueue: what is called for each batch of a virtqueue that Python
 * serves, made with the interpreter's lock held.
 *
 * The functions are those of vfiotool.native._library, which has virtio/direct.c; they come as the
 * address of their table. native/direct.py makes and ends the queue, and has what is rare.
 */
#include "python/direct_types.h"

PyObject *vt_direct_refuse(DirectQueue *queue, int reason, PyObject *number, unsigned room)
{
	PyObject *answer = PyObject_CallMethod((PyObject *)queue, "_refuse", "iOI", reason,
					       number ? number : Py_None, room);

	if (answer) {
		Py_DECREF(answer);
		PyErr_SetString(PyExc_RuntimeError, "the refusal was not raised");
	}
	return NULL;
}

int vt_direct_check_thread(DirectQueue *queue)
{
	if (PyThread_get_thread_ident() == queue->thread)
		return 0;
	vt_direct_refuse(queue, VT_QUEUE_THREAD, NULL, 0);
	return -1;
}

/* Whether this thread may call now: 0, or -1 with an exception set. */
static int check(DirectQueue *self)
{
	if (vt_direct_check_thread(self))
		return -1;
	if (self->queue)
		return 0;
	vt_direct_refuse(self, VT_QUEUE_STOPPED, NULL, 0);
	return -1;
}

/* Appends requests for `count` chains to a list. 0, or -1 with an exception set. */
static int append_requests(DirectQueue *self, PyObject *list, const struct vt_chain *chains,
			   const struct iovec *segments, int count)
{
	for (int i = 0; i < count; i++) {
		PyObject *request = vt_request_new(self, &chains[i], segments);
		int failed = !request || PyList_Append(list, request);

		Py_XDECREF(request);
		if (failed)
			return -1;
	}
	return 0;
}

static PyObject *fetch(DirectQueue *self, PyObject *const *given, Py_ssize_t count,
		       PyObject *keywords)
{
	static const char *const names[] = { "most", NULL };
	const struct vt_chain *chains;
	const struct iovec *segments;
	size_t most = VT_DIRECT_BATCH;
	PyObject *taken[1], *found;
	int collects, got, failed;

	if (vt_take_arguments("fetch", names, given, count, keywords, taken))
		return NULL;
	if (taken[0])
		most = PyLong_AsSize_t(taken[0]);
	if ((most == (size_t)-1 && PyErr_Occurred()) || check(self))
		return NULL;
	found = PyList_New(0);
	if (!found)
		return NULL;
	/* A collection may run code that calls this queue, whose chains stand where they are only
	 * until then. */
	collects = PyGC_Disable();
	got = self->calls->fetch(self->queue,
				 most < VT_DIRECT_BATCH ? (uint32_t)most : VT_DIRECT_BATCH,
				 &chains, &segments);
	failed = append_requests(self, found, chains, segments, got);
	if (collects)
		PyGC_Enable();
	if (failed)
		Py_CLEAR(found);
	return found;
}

static PyObject *publish(DirectQueue *self, PyObject *unused)
{
	(void)unused;
	if (check(self))
		return NULL;
	self->calls->publish(self->queue);
	Py_RETURN_NONE;
}

static PyObject *notify(DirectQueue *self, PyObject *const *given, Py_ssize_t count,
			PyObject *keywords)
{
	static const char *const names[] = { "on", NULL };
	PyObject *taken[1];
	int on;

	if (vt_take_arguments("notify", names, given, count, keywords, taken))
		return NULL;
	if (!taken[0]) {
		PyErr_SetString(PyExc_TypeError, "notify needs to be told whether");
		return NULL;
	}
	on = PyObject_IsTrue(taken[0]);
	if (on < 0 || check(self))
		return NULL;
	return PyBool_FromLong(self->calls->notify(self->queue, on));
}

static PyObject *requests(DirectQueue *self, PyObject *unused)
{
	PyObject *found = PyList_New(0);

	(void)unused;
	for (QueueRequest *one = self->in_flight; found && one; one = one->after)
		if (PyList_Append(found, (PyObject *)one))
			Py_CLEAR(found);
	return found;
}

static void leave_all(DirectQueue *self)
{
	while (self->in_flight)
		vt_request_leave(self->in_flight);
}

static PyObject *forget(DirectQueue *self, PyObject *unused)
{
	(void)unused;
	if (check(self))
		return NULL;
	self->queue = NULL;
	leave_all(self);
	Py_RETURN_NONE;
}

static PyObject *set_views(DirectQueue *self, PyObject *object)
{
	GuestMemory *memory = vt_as_guest_memory(object), *old = self->memory;

	if (!memory || check(self))
		return NULL;
	self->memory = (GuestMemory *)Py_NewRef(object);
	Py_DECREF((PyObject *)old);
	Py_RETURN_NONE;
}

static PyObject *get_is_open(DirectQueue *self, void *unused)
{
	(void)unused;
	return PyBool_FromLong(self->queue != NULL);
}

static PyObject *get_completed(DirectQueue *self, void *unused)
{
	(void)unused;
	return Py_NewRef(self->completed ? self->completed : Py_None);
}

static int set_completed(DirectQueue *self, PyObject *call, void *unused)
{
	PyObject *old = self->completed;

	(void)unused;
	self->completed = call && call != Py_None ? Py_NewRef(call) : NULL;
	Py_XDECREF(old);
	return 0;
}

static int direct_init(DirectQueue *self, PyObject *arguments, PyObject *keywords)
{
	unsigned long long queue, calls;
	PyObject *memory, *type;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "DirectQueue takes no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(arguments, "KKOO", &queue, &calls, &memory, &type))
		return -1;
	if (self->memory || !queue || !calls) {
		PyErr_SetString(PyExc_ValueError, "DirectQueue has one queue and its functions");
		return -1;
	}
	if (!vt_as_guest_memory(memory) || !vt_as_request_type(type))
		return -1;
	self->queue = (struct vt_direct *)(uintptr_t)queue;
	self->calls = (const struct vt_direct_calls *)(uintptr_t)calls;
	self->thread = PyThread_get_thread_ident();
	self->memory = (GuestMemory *)Py_NewRef(memory);
	self->requests = (PyTypeObject *)Py_NewRef(type);
	return 0;
}

static int direct_traverse(DirectQueue *self, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE((PyObject *)self));
	Py_VISIT((PyObject *)self->requests);
	Py_VISIT(self->completed);
	for (QueueRequest *one = self->in_flight; one; one = one->after)
		Py_VISIT((PyObject *)one);
	return 0;
}

static int direct_clear(DirectQueue *self)
{
	Py_CLEAR(self->completed);
	leave_all(self);
	return 0;
}

static void direct_dealloc(DirectQueue *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	PyObject_GC_UnTrack(self);
	direct_clear(self);
	Py_XDECREF((PyObject *)self->memory);
	Py_XDECREF((PyObject *)self->requests);
	release(self);
	Py_DECREF(type);
}

#define KEYWORDS(name, text)                                                                       \
	{ #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL | METH_KEYWORDS, text }

static PyMethodDef direct_methods[] = {
	KEYWORDS(fetch, "fetch($self, most=64)\n--\n\n"
			"Up to `most` (64) available requests, none if there are none or the queue is\n"
			"broken."),
	KEYWORDS(notify, "notify($self, on)\n--\n\n"
			 "Ask for kicks, or say that none is needed; whether requests wait already."),
	{ "publish", (PyCFunction)publish, METH_NOARGS,
	  "publish($self, /)\n--\n\n"
	  "Make completions visible to the driver, with a signal if it wants one." },
	{ "requests", (PyCFunction)requests, METH_NOARGS,
	  "requests($self, /)\n--\n\n"
	  "Those that were fetched and have not ended, the latest first." },
	{ "_set_views", (PyCFunction)set_views, METH_O,
	  "_set_views(memory): a GuestMemory for what is fetched from now on." },
	{ "_forget", (PyCFunction)forget, METH_NOARGS,
	  "_forget(): the queue is stopped; what is in flight is nobody's here." },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef direct_attributes[] = {
	{ "is_open", (getter)(void (*)(void))get_is_open, NULL, "Whether it was not stopped.", NULL },
	{ "completed", (getter)(void (*)(void))get_completed, (setter)(void (*)(void))set_completed,
	  "Called at each completion, unless whoever completes publishes by itself (None).", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot direct_slots[] = {
	{ Py_tp_doc,
	  (void *)"DirectQueue(queue, calls, memory, type, /)\n--\n\n"
		  "A virtqueue that Python serves: the address of the queue and of the table of its\n"
		  "functions, the GuestMemory that it lies in, and QueueRequest." },
	{ Py_tp_init, (void *)direct_init },
	{ Py_tp_dealloc, (void *)direct_dealloc },
	{ Py_tp_traverse, (void *)direct_traverse },
	{ Py_tp_clear, (void *)direct_clear },
	{ Py_tp_methods, direct_methods },
	{ Py_tp_getset, direct_attributes },
	{ 0, NULL },
};

static PyType_Spec direct_spec = {
	.name = "vfiotool.native._types.DirectQueue",
	.basicsize = sizeof(DirectQueue),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
	.slots = direct_slots,
};

int vt_add_direct_type(PyObject *module)
{
	return vt_add_type(module, "DirectQueue", &direct_spec);
}
