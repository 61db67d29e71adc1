/* What the types of vfiotool.native._types share. */
#ifndef VT_MODULE_H
#define VT_MODULE_H

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Beside enum vt_refusal of mmio.h. */
#define VT_BAD_VALUE 7   /* the value does not fit the width */
#define VT_WINDOW_BUSY 8 /* another thread is polling the window */

/* Calls the function that vfio/native.py has set, which raises; always NULL. */
PyObject *vt_refuse(PyObject *self, int reason, uint64_t offset, unsigned width);

/* Adds the type that `spec` describes to the module as `name`: 0, or -1 with an exception set. */
int vt_add_type(PyObject *module, const char *name, PyType_Spec *spec);
/* Adds the type `Event` to the module: 0, or -1 with an exception set. */
int vt_add_event_type(PyObject *module);
/* The same for `Mapper`. */
int vt_add_mapper_type(PyObject *module);

#endif
