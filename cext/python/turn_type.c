/* vfiotool.native._types.TurnLock: a lock for threads that change Python's objects in turn.
 *
 * It is given and taken with the interpreter's lock held, and who waits for it waits without either.
 * A lock of the threading module goes to a thread that has not got the interpreter's lock yet: the
 * one that is running cannot take it again, and from then on each command costs a switch of threads.
 * Here the running thread goes on until its time is over.
 */
#include "python/queue_types.h"

#include <time.h>

/* What is held up longer than a switch of threads takes is looked for less often. */
#define NAP_NS 20000
#define LONG_NAP_NS 2000000
#define NAPS 100
/* So many times in vain, and the next one that lets go of it makes room. */
#define PATIENCE 3

static void nap(long nanoseconds)
{
	struct timespec time = { 0, nanoseconds };

	Py_BEGIN_ALLOW_THREADS
	nanosleep(&time, NULL);
	Py_END_ALLOW_THREADS
}

static int is_mine(const TurnLock *self)
{
	return self->times && self->owner == PyThread_get_thread_ident();
}

/* Takes the lock: 0, or -1 with the exception of a signal's handler, which ends the wait where it
 * `breaks`. */
static int take(TurnLock *self, int breaks)
{
	int failed = 0;

	if (is_mine(self)) {
		self->times++;
		return 0;
	}
	for (unsigned tries = 0; self->times && !failed; tries++) {
		int urgent = tries >= PATIENCE;

		self->wanted += urgent;
		nap(tries < NAPS ? NAP_NS : LONG_NAP_NS);
		self->wanted -= urgent;
		failed = breaks && PyErr_CheckSignals();
	}
	if (failed)
		return -1;
	self->owner = PyThread_get_thread_ident();
	self->times = 1;
	return 0;
}

/* Lets go of the lock once: 0, or -1 with an exception set where it is not this thread's. */
static int give(TurnLock *self)
{
	if (!is_mine(self)) {
		PyErr_SetString(PyExc_RuntimeError, "the lock is not this thread's");
		return -1;
	}
	self->times--;
	return 0;
}

static PyObject *enter(TurnLock *self, PyObject *unused)
{
	(void)unused;
	if (take(self, 1))
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *leave(TurnLock *self, PyObject *const *given, Py_ssize_t count)
{
	(void)given;
	(void)count;
	if (give(self))
		return NULL;
	if (self->wanted && !self->times)
		nap(NAP_NS);
	Py_RETURN_NONE;
}

static PyObject *try_it(TurnLock *self, PyObject *unused)
{
	(void)unused;
	if (self->times && !is_mine(self))
		Py_RETURN_FALSE;
	if (take(self, 0))
		return NULL;
	Py_RETURN_TRUE;
}

static PyObject *without(TurnLock *self, PyObject *act)
{
	PyObject *answer;

	if (give(self))
		return NULL;
	answer = PyObject_CallNoArgs(act);
	/* No signal ends this: it is handled when the lock is back. */
	take(self, 0);
	return answer;
}

static PyMethodDef turn_methods[] = {
	{ "__enter__", (PyCFunction)enter, METH_NOARGS,
	  "__enter__($self, /)\n--\n\nTake it, or take it once more. Ctrl-C ends the wait for it." },
	{ "__exit__", (PyCFunction)(void (*)(void))leave, METH_FASTCALL,
	  "__exit__($self, /, *exc)\n--\n\nLet go of it once." },
	{ "try_enter", (PyCFunction)try_it, METH_NOARGS,
	  "try_enter($self, /)\n--\n\n`__enter__` without waiting: whether this thread has it." },
	{ "without", (PyCFunction)without, METH_O,
	  "without($self, act, /)\n--\n\n"
	  "What `act()` returns, with the lock let go of once; then this thread has it again." },
	{ NULL, NULL, 0, NULL },
};

static void turn_dealloc(PyObject *self)
{
	PyTypeObject *type = Py_TYPE(self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	release(self);
	Py_DECREF(type);
}

TurnLock *vt_as_turn_lock(PyObject *object)
{
	if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)turn_dealloc)
		return (TurnLock *)object;
	PyErr_SetString(PyExc_TypeError, "not a TurnLock");
	return NULL;
}

static PyType_Slot turn_slots[] = {
	{ Py_tp_doc,
	  (void *)"TurnLock()\n--\n\n"
		  "A lock for `with`, which a thread can take several times." },
	{ Py_tp_dealloc, (void *)turn_dealloc },
	{ Py_tp_methods, turn_methods },
	{ 0, NULL },
};

static PyType_Spec turn_spec = {
	.name = "vfiotool.native._types.TurnLock",
	.basicsize = sizeof(TurnLock),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = turn_slots,
};

int vt_add_turn_type(PyObject *module)
{
	return vt_add_type(module, "TurnLock", &turn_spec);
}
