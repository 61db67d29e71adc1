/* vfiotool.native._types: the hot paths as Python types, one file a type.
 *
 * The module knows no exception of vfiotool's and keeps no state: a refused access calls the method
 * `_refuse` of the object, which native/library.py defines and which raises.
 */
#include "python/module.h"

#include "vfio/interrupt.h"
#include "vfio/mmio.h"

PyObject *vt_refuse(PyObject *self, int reason, uint64_t offset, unsigned width)
{
	PyObject *answer = PyObject_CallMethod(self, "_refuse", "iKI", reason,
					       (unsigned long long)offset, width);

	if (answer) {
		Py_DECREF(answer);
		PyErr_SetString(PyExc_RuntimeError, "the refusal was not raised");
	}
	return NULL;
}

static Py_ssize_t place_of(const char *const *names, PyObject *name)
{
	for (Py_ssize_t i = 0; names[i]; i++)
		if (!PyUnicode_CompareWithASCIIString(name, names[i]))
			return i;
	return -1;
}

int vt_take_arguments(const char *function, const char *const *names, PyObject *const *given,
		      Py_ssize_t count, PyObject *keywords, PyObject **taken)
{
	Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0, room = 0;

	for (; names[room]; room++)
		taken[room] = room < count ? given[room] : NULL;
	if (count > room) {
		PyErr_Format(PyExc_TypeError, "%s takes %zd arguments at most (%zd given)",
			     function, room, count);
		return -1;
	}
	for (Py_ssize_t i = 0; i < named; i++) {
		PyObject *name = PyTuple_GetItem(keywords, i);
		Py_ssize_t place = place_of(names, name);

		if (place < 0 || taken[place]) {
			PyErr_Format(PyExc_TypeError, "%s: unexpected argument %R", function, name);
			return -1;
		}
		taken[place] = given[count + i];
	}
	return 0;
}

int vt_add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
	PyObject *type = PyType_FromSpec(spec);
	int result = type ? PyModule_AddObjectRef(module, name, type) : -1;

	Py_XDECREF(type);
	return result;
}

static PyObject *fork_generation(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	return PyLong_FromUnsignedLongLong(vt_fork_generation);
}

static PyObject *irq_action(PyObject *module, PyObject *arguments)
{
	unsigned index, start, count, action;
	int device, result;

	(void)module;
	if (!PyArg_ParseTuple(arguments, "iIIII", &device, &index, &start, &count, &action))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	result = vt_irq_action(device, index, start, count, action);
	Py_END_ALLOW_THREADS
	return PyLong_FromLong(result);
}

static PyMethodDef functions[] = {
	{ "irq_action", irq_action, METH_VARARGS,
	  "irq_action(device, index, start, count, action): VFIO_DEVICE_SET_IRQS without data;\n"
	  "0 or a negative errno." },
	{ "read_folder", vt_read_folder, METH_VARARGS,
	  "read_folder(path, files, links): what the files of these names below a folder hold, and\n"
	  "where the links lead; an errno in the place of what failed." },
	{ "fork_generation", fork_generation, METH_NOARGS,
	  "How many forks lie between this process and the one that loaded the library." },
	{ NULL, NULL, 0, NULL },
};

static int module_exec(PyObject *module)
{
	vt_watch_forks();
	if (vt_add_window_type(module) || vt_add_handle_type(module))
		return -1;
	if (vt_add_event_type(module) || vt_add_mapper_type(module))
		return -1;
	if (vt_add_guest_type(module) || vt_add_request_type(module))
		return -1;
	if (vt_add_direct_type(module))
		return -1;
	if (vt_add_turn_type(module))
		return -1;
	if (vt_add_queue_type(module) || vt_add_pin_type(module))
		return -1;
	if (vt_add_command_types(module))
		return -1;
	return vt_add_shared_type(module);
}

static PyModuleDef_Slot module_slots[] = {
	{ Py_mod_exec, (void *)module_exec },
	{ 0, NULL },
};

static struct PyModuleDef module_definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "vfiotool.native._types",
	.m_doc = "The hot paths of vfiotool.vfio as Python types; see vfiotool.native.library.",
	.m_methods = functions,
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__types(void);

PyMODINIT_FUNC PyInit__types(void)
{
	return PyModuleDef_Init(&module_definition);
}
