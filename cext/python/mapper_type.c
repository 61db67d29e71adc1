/* vfiotool.native._types.Mapper: maps memory for devices, and unmaps it, through either interface.
 *
 * In C so that a mapping costs what its ioctl costs: a page of 4 KiB is mapped in less time than
 * Python takes for a few calls of its own. Failures are explained by two methods that the Python
 * class has, `_map_failed` and `_unmap_failed`.
 */
#include "python/module.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "vfio/mapping.h"
#include "vfio/mmio.h"
#include "vfio/uapi_compat.h"

#define NUMBERS_MAX 3
#define VT_UNMAP_ALL 2u /* VFIO_DMA_UNMAP_FLAG_ALL */

typedef struct {
	PyObject_HEAD
	PyObject *handle; /* of a container or an iommufd; NULL while there is none */
	int is_iommufd;
	uint32_t ioas;
	uint64_t generation;
} Mapper;

/* Rows of numbers, one after another: a copy of what Python gave. */
struct rows {
	uint64_t *numbers;
	uint32_t count;
};

/* Through `unsigned long`, where that has 64 bits: before Python 3.13 the conversion to `long long`
 * goes byte by byte for all but small numbers, and addresses are not small. */
static uint64_t to_u64(PyObject *integer)
{
#if ULONG_MAX == UINT64_MAX
	return PyLong_AsUnsignedLong(integer);
#else
	return PyLong_AsUnsignedLongLong(integer);
#endif
}

static int take_u64(PyObject *object, uint64_t *number)
{
	PyObject *index;

	if (PyLong_CheckExact(object)) {
		*number = to_u64(object);
	} else {
		index = PyNumber_Index(object);
		if (!index)
			return -1;
		*number = to_u64(index);
		Py_DECREF(index);
	}
	return *number == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

static int take_numbers(PyObject *const *objects, Py_ssize_t given, Py_ssize_t wanted,
			uint64_t *numbers, const char *what)
{
	if (given != wanted) {
		PyErr_Format(PyExc_TypeError, "%s takes %zd positional arguments (%zd given)", what,
			     wanted, given);
		return -1;
	}
	for (Py_ssize_t i = 0; i < wanted; i++)
		if (take_u64(objects[i], &numbers[i]))
			return -1;
	return 0;
}

/* The keywords `read` and `write`, both of which are needed, as VFIO_DMA_MAP_FLAG_*. */
static int take_rights(PyObject *const *values, PyObject *names, uint32_t *flags)
{
	Py_ssize_t named = names ? PyTuple_Size(names) : 0;

	*flags = 0;
	for (Py_ssize_t i = 0; i < named; i++) {
		PyObject *name = PyTuple_GetItem(names, i);
		int truth = PyObject_IsTrue(values[i]);

		if (truth < 0)
			return -1;
		if (!PyUnicode_CompareWithASCIIString(name, "read")) {
			*flags |= truth ? VT_DMA_READ : 0;
		} else if (!PyUnicode_CompareWithASCIIString(name, "write")) {
			*flags |= truth ? VT_DMA_WRITE : 0;
		} else {
			PyErr_Format(PyExc_TypeError, "a mapping has no argument %R", name);
			return -1;
		}
	}
	if (named == 2)
		return 0;
	PyErr_SetString(PyExc_TypeError, "a mapping needs the arguments read and write");
	return -1;
}

static void release_rows(struct rows *rows)
{
	free(rows->numbers);
}

static int take_row(PyObject *row, Py_ssize_t width, uint64_t *numbers)
{
	PyObject *whole = PyTuple_CheckExact(row) ? Py_NewRef(row) : PySequence_Tuple(row);
	int failed = !whole;

	if (!failed && PyTuple_Size(whole) != width) {
		PyErr_Format(PyExc_ValueError, "a row has %zd numbers, not %zd", width,
			     PyTuple_Size(whole));
		failed = 1;
	}
	for (Py_ssize_t i = 0; !failed && i < width; i++)
		failed = take_u64(PyTuple_GetItem(whole, i), &numbers[i]);
	Py_XDECREF(whole);
	return failed ? -1 : 0;
}

/* An array of 64-bit numbers, such as array("Q") or numpy's uint64. Copied: another thread may
 * change it while the lock is released, and what was mapped is to be taken away again, not what it
 * says then. */
static int copy_buffer(PyObject *object, Py_ssize_t width, struct rows *rows)
{
	const char *format;
	Py_buffer buffer;
	int failed = -1;

	if (PyObject_GetBuffer(object, &buffer, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS))
		return -1;
	format = buffer.format ? buffer.format : "B";
	format += *format == '@' || *format == '=';
	if (buffer.itemsize != 8 || (strcmp(format, "Q") && strcmp(format, "L"))) {
		PyErr_SetString(PyExc_TypeError, "rows are unsigned numbers of 64 bits");
	} else if (buffer.len % (8 * width) || buffer.len / (8 * width) > UINT32_MAX) {
		PyErr_Format(PyExc_ValueError, "not whole rows of %zd numbers", width);
	} else if (!(rows->numbers = malloc((size_t)buffer.len + 1))) {
		PyErr_NoMemory();
	} else {
		memcpy(rows->numbers, buffer.buf, (size_t)buffer.len);
		rows->count = (uint32_t)(buffer.len / (8 * width));
		failed = 0;
	}
	PyBuffer_Release(&buffer);
	return failed;
}

static int copy_rows(PyObject *object, Py_ssize_t width, struct rows *rows)
{
	PyObject *list = PyList_Check(object) ? Py_NewRef(object) : PySequence_List(object);
	int failed = !list;
	Py_ssize_t count = failed ? 0 : PyList_Size(list);

	if (!failed && count > UINT32_MAX) {
		PyErr_SetString(PyExc_OverflowError, "too many rows");
		failed = 1;
	}
	if (!failed) {
		rows->numbers = calloc((size_t)count + 1, (size_t)width * sizeof(*rows->numbers));
		if (!rows->numbers) {
			PyErr_NoMemory();
			failed = 1;
		}
	}
	/* The length anew each time: a row's own code may change the list. */
	for (Py_ssize_t i = 0; !failed && i < count; i++) {
		PyObject *row = PyList_GetItem(list, i);

		Py_XINCREF(row);
		failed = !row || take_row(row, width, rows->numbers + i * width);
		Py_XDECREF(row);
	}
	Py_XDECREF(list);
	rows->count = (uint32_t)count;
	return failed ? -1 : 0;
}

static int take_rows(PyObject *object, Py_ssize_t width, struct rows *rows)
{
	int failed = PyObject_CheckBuffer(object) ? copy_buffer(object, width, rows) :
						    copy_rows(object, width, rows);

	if (failed)
		release_rows(rows);
	return failed;
}

/* The descriptor, open until vt_handle_give; or -EBADF: there is no address space, it was closed,
 * or this is a child of its process. */
static int take(const Mapper *self)
{
	return self->generation == vt_fork_generation ? vt_handle_take(self->handle) : -EBADF;
}

static PyObject *map_failed(Mapper *self, int result, const uint64_t *row)
{
	return PyObject_CallMethod((PyObject *)self, "_map_failed", "iKKK", result,
				   (unsigned long long)row[0], (unsigned long long)row[1],
				   (unsigned long long)row[2]);
}

static PyObject *unmap_failed(Mapper *self, int result, uint64_t iova, uint64_t size)
{
	return PyObject_CallMethod((PyObject *)self, "_unmap_failed", "iKK", result,
				   (unsigned long long)iova, (unsigned long long)size);
}

static PyObject *map(Mapper *self, PyObject *const *arguments, Py_ssize_t count, PyObject *names)
{
	PyObject *handle = self->handle;
	uint64_t row[NUMBERS_MAX];
	uint32_t flags;
	int fd, result;

	if (take_numbers(arguments, count, 3, row, "map") ||
	    take_rights(arguments + count, names, &flags))
		return NULL;
	result = fd = take(self);
	if (fd >= 0) {
		Py_BEGIN_ALLOW_THREADS
		result = self->is_iommufd ?
				 vt_iommufd_map(fd, self->ioas, row[0], row[1], row[2], flags) :
				 vt_type1_map(fd, row[0], row[1], row[2], flags);
		Py_END_ALLOW_THREADS
		vt_handle_give(handle);
	}
	if (result < 0)
		return map_failed(self, result, row);
	Py_RETURN_NONE;
}

static PyObject *unmap(Mapper *self, PyObject *const *arguments, Py_ssize_t count)
{
	PyObject *handle = self->handle;
	uint64_t row[NUMBERS_MAX], size;
	int fd, result;

	if (take_numbers(arguments, count, 2, row, "unmap"))
		return NULL;
	size = row[1];
	result = fd = take(self);
	if (fd >= 0) {
		Py_BEGIN_ALLOW_THREADS
		result = self->is_iommufd ? vt_iommufd_unmap(fd, self->ioas, row[0], &size) :
					    vt_type1_unmap(fd, row[0], &size, 0);
		Py_END_ALLOW_THREADS
		vt_handle_give(handle);
	}
	if (result < 0)
		return unmap_failed(self, result, row[0], row[1]);
	return PyLong_FromUnsignedLongLong(size);
}

/* Takes the first `count` of `rows` (address, iova, size) away again: as vt_type1_unmap. */
static int roll_back(const Mapper *self, int fd, const uint64_t *rows, uint32_t count)
{
	int first = 0;

	for (; count; count--, rows += 3) {
		uint64_t size = rows[2];
		int result = self->is_iommufd ? vt_iommufd_unmap(fd, self->ioas, rows[1], &size) :
						vt_type1_unmap(fd, rows[1], &size, 0);

		first = first ? first : result;
	}
	return first;
}

/* The exception for row `done`, or for the way back to none, if that failed with `back`. */
static PyObject *map_many_failed(Mapper *self, int result, int back, const uint64_t *rows,
				 uint32_t done)
{
	rows += (size_t)done * 3;
	if (back < 0)
		return PyObject_CallMethod((PyObject *)self, "_roll_back_failed", "iiKK", result,
					   back, (unsigned long long)rows[1],
					   (unsigned long long)rows[2]);
	return map_failed(self, result, rows);
}

static PyObject *map_many(Mapper *self, PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names)
{
	struct rows rows = { 0 };
	PyObject *answer = NULL;
	PyObject *handle = self->handle;
	uint32_t flags, done = 0;
	int fd, result, back = 0;

	if (count != 1) {
		PyErr_SetString(PyExc_TypeError, "map_many takes one positional argument");
		return NULL;
	}
	if (take_rights(arguments + count, names, &flags) || take_rows(arguments[0], 3, &rows))
		return NULL;
	result = fd = rows.count ? take(self) : 0;
	if (rows.count && fd >= 0) {
		Py_BEGIN_ALLOW_THREADS
		result = self->is_iommufd ?
				 vt_iommufd_map_many(fd, self->ioas, rows.numbers, rows.count,
						     flags, &done) :
				 vt_type1_map_many(fd, rows.numbers, rows.count, flags, &done);
		if (result < 0)
			back = roll_back(self, fd, rows.numbers, done);
		Py_END_ALLOW_THREADS
		vt_handle_give(handle);
	}
	if (result < 0)
		answer = map_many_failed(self, result, back, rows.numbers, done);
	else
		answer = Py_NewRef(Py_None);
	release_rows(&rows);
	return answer;
}

/* Unmaps rows from `*first` on until one fails, which `*first` then is, or all are done. Adds to
 * `total`; 0 or a negative errno. */
static int unmap_rows(Mapper *self, const struct rows *rows, uint32_t *first, uint64_t *total)
{
	PyObject *handle = self->handle;
	const uint64_t *numbers = rows->numbers + (size_t)*first * 2;
	uint32_t done = 0, left = rows->count - *first;
	uint64_t unmapped = 0;
	int result, fd = take(self);

	if (fd < 0)
		return fd;
	Py_BEGIN_ALLOW_THREADS
	result = self->is_iommufd ?
			 vt_iommufd_unmap_many(fd, self->ioas, numbers, left, &unmapped, &done) :
			 vt_type1_unmap_many(fd, numbers, left, &unmapped, &done);
	Py_END_ALLOW_THREADS
	vt_handle_give(handle);
	*first += done;
	*total += unmapped;
	return result;
}

static PyObject *unmap_many(Mapper *self, PyObject *argument)
{
	struct rows rows = { 0 };
	PyObject *answer;
	uint64_t total = 0;
	uint32_t next = 0;

	if (take_rows(argument, 2, &rows))
		return NULL;
	while (next < rows.count) {
		int result = unmap_rows(self, &rows, &next, &total);
		const uint64_t *row = rows.numbers + (size_t)next * 2;

		if (result >= 0)
			break;
		/* Raises, or says that the row was empty. */
		answer = unmap_failed(self, result, row[0], row[1]);
		if (!answer) {
			release_rows(&rows);
			return NULL;
		}
		Py_DECREF(answer);
		next++;
	}
	release_rows(&rows);
	return PyLong_FromUnsignedLongLong(total);
}

/* The bytes that were mapped, or a negative errno: VFIO_DMA_UNMAP_FLAG_ALL is not in every kernel.
 */
static PyObject *unmap_all(Mapper *self, PyObject *unused)
{
	PyObject *handle = self->handle;
	uint64_t size = self->is_iommufd ? UINT64_MAX : 0;
	int result, fd = take(self);

	(void)unused;
	if (fd < 0)
		return PyLong_FromLong(fd);
	Py_BEGIN_ALLOW_THREADS
	result = self->is_iommufd ? vt_iommufd_unmap(fd, self->ioas, 0, &size) :
				    vt_type1_unmap(fd, 0, &size, VT_UNMAP_ALL);
	Py_END_ALLOW_THREADS
	vt_handle_give(handle);
	return result < 0 ? PyLong_FromLong(result) : PyLong_FromUnsignedLongLong(size);
}

/* _aim(handle, ioas): of a container if `ioas` is None, of an iommufd otherwise. Once for all: a
 * call under way in another thread gives back what it took. */
static PyObject *aim(Mapper *self, PyObject *arguments)
{
	PyObject *handle, *ioas;
	uint64_t number = 0;
	int fd;

	if (!PyArg_ParseTuple(arguments, "OO", &handle, &ioas) ||
	    (ioas != Py_None && take_u64(ioas, &number)))
		return NULL;
	if (self->handle) {
		PyErr_SetString(PyExc_RuntimeError, "a Mapper has one handle");
		return NULL;
	}
	fd = vt_handle_take(handle);
	if (fd < 0) {
		PyErr_SetString(PyExc_TypeError, "not an open Handle");
		return NULL;
	}
	vt_handle_give(handle);
	self->handle = Py_NewRef(handle);
	self->is_iommufd = ioas != Py_None;
	self->ioas = (uint32_t)number;
	self->generation = vt_fork_generation;
	Py_RETURN_NONE;
}

static int mapper_init(Mapper *self, PyObject *arguments, PyObject *keywords)
{
	(void)self;
	(void)keywords;
	if (PyTuple_Size(arguments)) {
		PyErr_SetString(PyExc_TypeError, "Mapper takes no arguments");
		return -1;
	}
	return 0;
}

static void mapper_dealloc(Mapper *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	Py_XDECREF(self->handle);
	release(self);
	Py_DECREF(type);
}

static PyMethodDef mapper_methods[] = {
	{ "map", (PyCFunction)(void (*)(void))map, METH_FASTCALL | METH_KEYWORDS,
	  "map($self, address, iova, size, /, *, read, write)\n--\n\n"
	  "Let devices read and write `size` bytes of this process at `iova`. Raises UsageError where\n"
	  "something is mapped already, KernelError." },
	{ "unmap", (PyCFunction)(void (*)(void))unmap, METH_FASTCALL,
	  "unmap($self, iova, size, /)\n--\n\n"
	  "Take the mappings within `size` bytes from `iova` on away; the bytes that were mapped,\n"
	  "which may be 0. Raises UsageError for a part of a mapping, KernelError." },
	{ "map_many", (PyCFunction)(void (*)(void))map_many, METH_FASTCALL | METH_KEYWORDS,
	  "map_many($self, rows, /, *, read, write)\n--\n\n"
	  "As `map` for each row (address, iova, size); all of them or none. Rows are a sequence of\n"
	  "tuples, or a buffer of unsigned 64-bit numbers, which is copied first." },
	{ "unmap_many", (PyCFunction)(void (*)(void))unmap_many, METH_O,
	  "unmap_many($self, rows, /)\n--\n\n"
	  "As `unmap` for each row (iova, size); the sum of the bytes." },
	{ "_unmap_all", (PyCFunction)(void (*)(void))unmap_all, METH_NOARGS,
	  "_unmap_all(): take all away; the bytes that were mapped, or a negative errno." },
	{ "_aim", (PyCFunction)(void (*)(void))aim, METH_VARARGS,
	  "_aim(handle, ioas): map through this container (ioas None) or iommufd." },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot mapper_slots[] = {
	{ Py_tp_doc, (void *)"Mappings of an address space for devices." },
	{ Py_tp_init, (void *)mapper_init },
	{ Py_tp_dealloc, (void *)mapper_dealloc },
	{ Py_tp_methods, mapper_methods },
	{ 0, NULL },
};

static PyType_Spec mapper_spec = {
	.name = "vfiotool.native._types.Mapper",
	.basicsize = sizeof(Mapper),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = mapper_slots,
};

int vt_add_mapper_type(PyObject *module)
{
	return vt_add_type(module, "Mapper", &mapper_spec);
}
