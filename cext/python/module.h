/* What the types of vfiotool.native._types share. */
#ifndef VT_MODULE_H
#define VT_MODULE_H

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Beside enum vt_refusal of mmio.h. */
#define VT_BAD_VALUE 7     /* the value does not fit the width */
#define VT_WINDOW_PINNED 8 /* C keeps an address of the window */
#define VT_BAD_TIME 9      /* not a number of seconds */

/* Calls the method `_refuse` of `self`, which raises. Always NULL with an exception set. */
PyObject *vt_refuse(PyObject *self, int reason, uint64_t offset, unsigned width);

/* Sorts the arguments of a METH_FASTCALL | METH_KEYWORDS function by `names`, of which a NULL is the
 * last: `taken` has a place for each, NULL where it was not given. 0, or -1 with TypeError set. */
int vt_take_arguments(const char *function, const char *const *names, PyObject *const *given,
		      Py_ssize_t count, PyObject *keywords, PyObject **taken);

/* The descriptor of a `Handle`, which stays open until vt_handle_give: or -EBADF for one that was
 * closed, -EINVAL for an object that is none. NULL is closed. Needs the interpreter's lock. */
int vt_handle_take(PyObject *handle);
/* The counterpart of a vt_handle_take that gave a descriptor. Closes it if Handle.close was called
 * meanwhile and nobody else uses it. Needs the interpreter's lock. */
void vt_handle_give(PyObject *handle);

/* read_folder(path, files, links), a function of the module: a list of what the files of these
 * names below `path` hold, as bytes, and one of where the links lead, as str; an errno in the place
 * of what failed. If `path` itself cannot be opened, its errno stands everywhere. The names are
 * tuples of str or bytes. A file of more than a megabyte is EFBIG. NULL with an exception set for
 * arguments of other types, names with a NUL, and want of memory. */
PyObject *vt_read_folder(PyObject *module, PyObject *arguments);

/* Adds the type that `spec` describes to the module as `name`: 0, or -1 with an exception set. */
int vt_add_type(PyObject *module, const char *name, PyType_Spec *spec);
/* Add one type each, or two: 0, or -1 with an exception set. */
int vt_add_command_types(PyObject *module);
int vt_add_direct_type(PyObject *module);
int vt_add_event_type(PyObject *module);
int vt_add_guest_type(PyObject *module);
int vt_add_handle_type(PyObject *module);
int vt_add_mapper_type(PyObject *module);
int vt_add_pin_type(PyObject *module);
int vt_add_queue_type(PyObject *module);
int vt_add_request_type(PyObject *module);
int vt_add_shared_type(PyObject *module);
int vt_add_turn_type(PyObject *module);
int vt_add_window_type(PyObject *module);

#endif
