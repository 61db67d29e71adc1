/* read_folder: many small files and links of one folder in one call, without the interpreter's
 * lock.
 *
 * Listing a host reads a dozen attributes of each of its functions; the way from the root to the
 * folder is walked once for all of them, and no Python object is made but what was read.
 */
#define _GNU_SOURCE /* O_PATH */
#include "python/module.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* An attribute is a page at most (fs/sysfs/file.c, PAGE_SIZE): a read that gives less was the last.
 */
#define PAGE 4096
#define LONGEST (1u << 20)
#define FEW 3

enum kind { A_FILE, A_LINK };

struct item {
	PyObject *held; /* the name, encoded for the file system */
	const char *name;
	enum kind kind;
	int error; /* 0, or why there is nothing */
	size_t at, length;
};

/* What was read of all items, one after the other. */
struct arena {
	char *data;
	size_t used, room;
};

static int make_room(struct arena *arena, size_t more)
{
	size_t room = arena->room ? arena->room : 4 * PAGE;
	char *data;

	while (room - arena->used < more)
		room *= 2;
	if (room == arena->room)
		return 0;
	data = realloc(arena->data, room);
	if (!data)
		return ENOMEM;
	arena->data = data;
	arena->room = room;
	return 0;
}

static int read_file(int folder, struct item *item, struct arena *arena)
{
	int error = 0, descriptor;
	ssize_t got;

	do
		descriptor = openat(folder, item->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	while (descriptor < 0 && errno == EINTR);
	if (descriptor < 0)
		return errno;
	do {
		error = make_room(arena, PAGE);
		if (error)
			break;
		got = read(descriptor, arena->data + arena->used, arena->room - arena->used);
		if (got > 0) {
			arena->used += (size_t)got;
			item->length += (size_t)got;
			if (item->length > LONGEST)
				error = EFBIG;
		} else if (got < 0 && errno != EINTR) {
			error = errno;
		}
	} while (!error && (got >= PAGE || got < 0));
	close(descriptor);
	return error;
}

static int read_link(int folder, struct item *item, struct arena *arena)
{
	for (size_t room = PAGE; room <= LONGEST; room *= 2) {
		int error = make_room(arena, room);
		ssize_t got;

		if (error)
			return error;
		got = readlinkat(folder, item->name, arena->data + arena->used, room);
		if (got < 0)
			return errno;
		if ((size_t)got < room) {
			arena->used += (size_t)got;
			item->length = (size_t)got;
			return 0;
		}
	}
	return ENAMETOOLONG;
}

static int read_item(int folder, struct item *item, struct arena *arena)
{
	item->at = arena->used;
	return item->kind == A_FILE ? read_file(folder, item, arena) :
				      read_link(folder, item, arena);
}

/* By whole paths, where there are so few that opening the folder would cost more. */
static void read_few(const char *path, struct item *items, Py_ssize_t count, struct arena *arena)
{
	char whole[PATH_MAX];

	for (Py_ssize_t n = 0; n < count; n++) {
		struct item item = items[n];
		int length = snprintf(whole, sizeof(whole), "%s/%s", path, item.name);

		item.name = whole;
		if (length < 0 || (size_t)length >= sizeof(whole))
			items[n].error = ENAMETOOLONG;
		else
			items[n].error = read_item(AT_FDCWD, &item, arena);
		items[n].at = item.at;
		items[n].length = item.length;
	}
}

static void read_items(const char *path, struct item *items, Py_ssize_t count, struct arena *arena)
{
	int folder, error;

	if (count <= FEW) {
		read_few(path, items, count, arena);
		return;
	}
	folder = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
	error = folder < 0 ? errno : 0;
	for (Py_ssize_t n = 0; n < count; n++)
		items[n].error = error ? error : read_item(folder, &items[n], arena);
	if (folder >= 0)
		close(folder);
}

static int take_names(PyObject *names, enum kind kind, struct item *items)
{
	Py_ssize_t count = PyTuple_Size(names);

	for (Py_ssize_t n = 0; n < count; n++) {
		if (!PyUnicode_FSConverter(PyTuple_GetItem(names, n), &items[n].held))
			return -1;
		items[n].name = PyBytes_AsString(items[n].held);
		items[n].kind = kind;
	}
	return 0;
}

static PyObject *as_list(const struct item *items, Py_ssize_t count, const struct arena *arena)
{
	PyObject *found = PyList_New(count);

	for (Py_ssize_t n = 0; found && n < count; n++) {
		const struct item *item = &items[n];
		PyObject *one;

		if (item->error)
			one = PyLong_FromLong(item->error);
		else if (item->kind == A_LINK)
			one = PyUnicode_DecodeFSDefaultAndSize(arena->data + item->at,
							       (Py_ssize_t)item->length);
		else
			one = PyBytes_FromStringAndSize(item->length ? arena->data + item->at : "",
							(Py_ssize_t)item->length);
		if (!one || PyList_SetItem(found, n, one))
			Py_CLEAR(found);
	}
	return found;
}

PyObject *vt_read_folder(PyObject *module, PyObject *arguments)
{
	PyObject *path, *files, *links, *contents = NULL, *targets = NULL, *found = NULL;
	Py_ssize_t count, first_link;
	struct arena arena = { NULL, 0, 0 };
	struct item *items;

	(void)module;
	if (!PyArg_ParseTuple(arguments, "O&O!O!", PyUnicode_FSConverter, &path, &PyTuple_Type,
			      &files, &PyTuple_Type, &links))
		return NULL;
	first_link = PyTuple_Size(files);
	count = first_link + PyTuple_Size(links);
	items = PyMem_Calloc((size_t)count + 1, sizeof(*items));
	if (!items) {
		Py_DECREF(path);
		return PyErr_NoMemory();
	}
	if (!take_names(files, A_FILE, items) && !take_names(links, A_LINK, items + first_link)) {
		const char *name = PyBytes_AsString(path);

		Py_BEGIN_ALLOW_THREADS
		read_items(name, items, count, &arena);
		Py_END_ALLOW_THREADS
		contents = as_list(items, first_link, &arena);
		if (contents)
			targets = as_list(items + first_link, count - first_link, &arena);
		if (targets)
			found = PyTuple_Pack(2, contents, targets);
	}
	Py_XDECREF(contents);
	Py_XDECREF(targets);
	for (Py_ssize_t n = 0; n < count; n++)
		Py_XDECREF(items[n].held);
	free(arena.data);
	PyMem_Free(items);
	Py_DECREF(path);
	return found;
}
