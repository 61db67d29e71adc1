#define _GNU_SOURCE
#include "virtio/memory.h"

#include <errno.h>
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Of linux/magic.h, where it is new or was never there. */
#define XFS 0x58465342

struct mapped {
	uint64_t guest, user, size;
	uint8_t *host;    /* of the region's first byte */
	uint8_t *mapping; /* from the file's first byte on: hugetlbfs maps whole pages only */
	size_t mapping_size;
	size_t page;      /* the mapping's page size */
	int slot;
	uint64_t io;      /* for devices; UINT64_MAX: they do not reach it */
};

struct vt_memory {
	int references;
	int broken;
	uint32_t count;
	struct mapped regions[]; /* by guest address */
};

/* What the handler of SIGBUS may look at: it must not follow a pointer into a map that is being
 * unmapped by another thread, so the ranges stand here by themselves. A slot's `start` is written
 * last and cleared first. */
struct slot {
	uintptr_t start, end, page;
	struct vt_memory *memory;
};

#define SLOTS VT_MEMORY_ROOM
static struct slot slots[SLOTS];
static uint32_t first_free; /* none before it is */
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;
static int guarded;

static int take_slot(struct vt_memory *memory, const struct mapped *region)
{
	int found = -ENOSPC;

	pthread_mutex_lock(&slots_lock);
	for (uint32_t i = first_free; i < SLOTS; i++) {
		if (slots[i].end)
			continue;
		first_free = i + 1;
		slots[i].memory = memory;
		slots[i].page = region->page;
		slots[i].end = (uintptr_t)region->mapping + region->mapping_size;
		__atomic_store_n(&slots[i].start, (uintptr_t)region->mapping, __ATOMIC_RELEASE);
		found = (int)i;
		break;
	}
	pthread_mutex_unlock(&slots_lock);
	return found;
}

static void give_slot(int slot)
{
	pthread_mutex_lock(&slots_lock);
	__atomic_store_n(&slots[slot].start, 0, __ATOMIC_RELEASE);
	slots[slot].end = 0;
	slots[slot].memory = NULL;
	if ((uint32_t)slot < first_free)
		first_free = (uint32_t)slot;
	pthread_mutex_unlock(&slots_lock);
}

static bool runs_over(uint64_t start, uint64_t size)
{
	return size == 0 || start + size - 1 < start;
}

static bool overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
	return a <= b + (b_size - 1) && b <= a + (a_size - 1);
}

static int check(const struct vt_region *regions, uint32_t count)
{
	if (count > VT_MEMORY_REGIONS)
		return -E2BIG;
	for (uint32_t i = 0; i < count; i++) {
		const struct vt_region *one = &regions[i];

		if (runs_over(one->guest, one->size) || runs_over(one->user, one->size) ||
		    runs_over(one->offset, one->size))
			return -EINVAL;
		for (uint32_t j = 0; j < i; j++)
			if (overlap(one->guest, one->size, regions[j].guest, regions[j].size) ||
			    overlap(one->user, one->size, regions[j].user, regions[j].size))
				return -EINVAL;
	}
	return 0;
}

/* Whether a file's pages are there without anybody's help but this kernel's. */
static bool is_local(int fd)
{
	struct statfs file_system;
	uint32_t type;

	if (fstatfs(fd, &file_system))
		return false;
	type = (uint32_t)file_system.f_type;
	return type == TMPFS_MAGIC || type == (uint32_t)HUGETLBFS_MAGIC ||
	       type == (uint32_t)RAMFS_MAGIC || type == EXT4_SUPER_MAGIC || type == XFS ||
	       type == (uint32_t)BTRFS_SUPER_MAGIC;
}

static int map_region(struct vt_memory *memory, const struct vt_region *announced, bool sized)
{
	struct mapped *region = &memory->regions[memory->count];
	uint64_t wanted = announced->offset + announced->size;
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	struct stat status;
	void *at;

	if (fstat(announced->fd, &status))
		return -errno;
	if (sized &&
	    (!S_ISREG(status.st_mode) || wanted > (uint64_t)status.st_size))
		return -EINVAL;
	if (sized && !is_local(announced->fd))
		return -EOPNOTSUPP;
	/* A file on hugetlbfs says its page size here; others say less than a page's multiple. */
	if (status.st_blksize > 0 && (uint64_t)status.st_blksize > page &&
	    ((uint64_t)status.st_blksize & ((uint64_t)status.st_blksize - 1)) == 0 &&
	    wanted <= UINT64_MAX - (uint64_t)status.st_blksize)
		page = (uint64_t)status.st_blksize;
	wanted = (wanted + page - 1) & ~(page - 1);
	if (wanted > (uint64_t)SIZE_MAX / 2)
		return -EINVAL;
	at = mmap(NULL, (size_t)wanted, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
		  announced->fd, 0);
	if (at == MAP_FAILED)
		return -errno;
	*region = (struct mapped){
		.guest = announced->guest,
		.user = announced->user,
		.size = announced->size,
		.host = (uint8_t *)at + announced->offset,
		.mapping = at,
		.mapping_size = (size_t)wanted,
		.page = (size_t)page,
		.io = UINT64_MAX,
	};
	madvise(at, (size_t)wanted, MADV_DONTFORK);
	madvise(at, (size_t)wanted, MADV_DONTDUMP);
	region->slot = take_slot(memory, region);
	if (region->slot < 0) {
		munmap(at, (size_t)wanted);
		return region->slot;
	}
	memory->count++;
	return 0;
}

static int by_guest(const void *a, const void *b)
{
	const struct mapped *x = a, *y = b;

	return x->guest < y->guest ? -1 : x->guest > y->guest;
}

static int create(const struct vt_region *regions, uint32_t count, bool sized,
		  struct vt_memory **memory)
{
	struct vt_memory *made;
	int result = check(regions, count);

	*memory = NULL;
	if (result)
		return result;
	made = calloc(1, sizeof(*made) + count * sizeof(made->regions[0]));
	if (!made)
		return -ENOMEM;
	made->references = 1;
	for (uint32_t i = 0; i < count && !result; i++)
		result = map_region(made, &regions[i], sized);
	if (result) {
		vt_memory_put(made);
		return result;
	}
	qsort(made->regions, made->count, sizeof(made->regions[0]), by_guest);
	*memory = made;
	return 0;
}

int vt_memory_create(const struct vt_region *regions, uint32_t count, struct vt_memory **memory)
{
	return create(regions, count, true, memory);
}

int vt_memory_create_unsized(const struct vt_region *regions, uint32_t count,
			     struct vt_memory **memory)
{
	return create(regions, count, false, memory);
}

struct vt_memory *vt_memory_get(struct vt_memory *memory)
{
	__atomic_add_fetch(&memory->references, 1, __ATOMIC_RELAXED);
	return memory;
}

void vt_memory_put(struct vt_memory *memory)
{
	if (!memory || __atomic_sub_fetch(&memory->references, 1, __ATOMIC_ACQ_REL))
		return;
	for (uint32_t i = 0; i < memory->count; i++) {
		give_slot(memory->regions[i].slot);
		munmap(memory->regions[i].mapping, memory->regions[i].mapping_size);
	}
	free(memory);
}

/* The region that holds a guest address, or NULL. */
static const struct mapped *find(const struct vt_memory *memory, uint64_t guest)
{
	uint32_t low = 0, high = memory->count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct mapped *region = &memory->regions[middle];

		if (guest < region->guest)
			high = middle;
		else if (guest - region->guest >= region->size)
			low = middle + 1;
		else
			return region;
	}
	return NULL;
}

int vt_memory_segments(const struct vt_memory *memory, uint64_t guest, uint64_t length,
		       struct iovec *segments, uint32_t room)
{
	uint32_t count = 0;

	while (length) {
		const struct mapped *region = find(memory, guest);
		uint64_t inside, piece;

		if (!region)
			return -EFAULT;
		if (count == room)
			return -ENOBUFS;
		inside = guest - region->guest;
		piece = region->size - inside;
		if (piece > length)
			piece = length;
		segments[count++] = (struct iovec){ region->host + inside, (size_t)piece };
		length -= piece;
		if (length && guest + piece < guest)
			return -EFAULT;
		guest += piece;
	}
	return (int)count;
}

int vt_memory_read(const struct vt_memory *memory, uint64_t guest, void *data, size_t length)
{
	uint8_t *to = data;

	while (length) {
		struct iovec piece;
		const struct mapped *region = find(memory, guest);
		uint64_t inside;

		if (!region)
			return -EFAULT;
		inside = guest - region->guest;
		piece.iov_len = region->size - inside < length ? region->size - inside : length;
		memcpy(to, region->host + inside, piece.iov_len);
		to += piece.iov_len;
		length -= piece.iov_len;
		if (length && guest + piece.iov_len < guest)
			return -EFAULT;
		guest += piece.iov_len;
	}
	return 0;
}

void *vt_memory_user(const struct vt_memory *memory, uint64_t user, uint64_t length,
		     uint32_t alignment)
{
	for (uint32_t i = 0; i < memory->count; i++) {
		const struct mapped *region = &memory->regions[i];
		uint64_t inside = user - region->user;
		uint8_t *host;

		if (user < region->user || inside >= region->size || length > region->size - inside)
			continue;
		host = region->host + inside;
		return (uintptr_t)host & (alignment - 1) ? NULL : host;
	}
	return NULL;
}

uint64_t vt_memory_guest(const struct vt_memory *memory, const void *host)
{
	const uint8_t *byte = host;

	for (uint32_t i = 0; i < memory->count; i++) {
		const struct mapped *region = &memory->regions[i];

		if (byte >= region->host && (uint64_t)(byte - region->host) < region->size)
			return region->guest + (uint64_t)(byte - region->host);
	}
	return UINT64_MAX;
}

int vt_memory_set_io(struct vt_memory *memory, uint32_t index, uint64_t io)
{
	if (index >= memory->count || io > UINT64_MAX - memory->regions[index].size)
		return -EINVAL;
	memory->regions[index].io = io;
	return 0;
}

uint64_t vt_memory_io(const struct vt_memory *memory, const void *host, uint64_t *left)
{
	const uint8_t *byte = host;

	for (uint32_t i = 0; i < memory->count; i++) {
		const struct mapped *region = &memory->regions[i];
		uint64_t inside = (uint64_t)(byte - region->host);

		if (byte < region->host || inside >= region->size || region->io == UINT64_MAX)
			continue;
		*left = region->size - inside;
		return region->io + inside;
	}
	return UINT64_MAX;
}

uint32_t vt_memory_references(const struct vt_memory *memory)
{
	return (uint32_t)__atomic_load_n(&memory->references, __ATOMIC_ACQUIRE);
}

uint32_t vt_memory_places(const struct vt_memory *memory, struct vt_place *places, uint32_t room)
{
	for (uint32_t i = 0; i < memory->count && i < room; i++)
		places[i] = (struct vt_place){ (uintptr_t)memory->regions[i].host,
					       memory->regions[i].size, memory->regions[i].guest };
	return memory->count;
}

bool vt_memory_is_broken(const struct vt_memory *memory)
{
	return __atomic_load_n(&memory->broken, __ATOMIC_ACQUIRE) != 0;
}

static bool replace_page(uintptr_t address, uintptr_t size)
{
	void *page = (void *)(address & ~(size - 1));

	return mmap(page, size, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

/* The thread that faulted holds a reference to the map, so its slot cannot go meanwhile. */
static void on_sigbus(int number, siginfo_t *info, void *context)
{
	uintptr_t address = (uintptr_t)info->si_addr;
	int saved = errno;

	for (uint32_t i = 0; i < SLOTS; i++) {
		uintptr_t start = __atomic_load_n(&slots[i].start, __ATOMIC_ACQUIRE);

		if (!start || address < start || address >= slots[i].end)
			continue;
		__atomic_store_n(&slots[i].memory->broken, 1, __ATOMIC_RELEASE);
		/* A huge page is replaced whole or not at all. */
		if (replace_page(address, (uintptr_t)sysconf(_SC_PAGESIZE)) ||
		    replace_page(address, slots[i].page)) {
			errno = saved;
			return;
		}
		break;
	}
	errno = saved;
	if (before.sa_flags & SA_SIGINFO) {
		before.sa_sigaction(number, info, context);
	} else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
		before.sa_handler(number);
	} else {
		/* Back to what the kernel does: the access is made again and ends the process. */
		signal(SIGBUS, SIG_DFL);
	}
}

int vt_memory_guard(void)
{
	struct sigaction action = { .sa_flags = SA_SIGINFO | SA_ONSTACK };
	int result = 0;

	action.sa_sigaction = on_sigbus;
	sigemptyset(&action.sa_mask);
	pthread_mutex_lock(&slots_lock);
	if (!guarded) {
		if (sigaction(SIGBUS, &action, &before))
			result = -errno;
		else
			guarded = 1;
	}
	pthread_mutex_unlock(&slots_lock);
	return result;
}
