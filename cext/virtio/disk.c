#define _GNU_SOURCE
#include "virtio/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Of linux/magic.h, where it is new or was never there. */
#define F2FS 0xF2F52010
#define XFS 0x58465342

/* What is known of a file's file system. Those that are not known to keep to RWF_NOWAIT do not get
 * the chance: FUSE's readahead, for one, waits for its server all the same (seen on 6.18). */
static void look_at_file(struct vt_disk *disk)
{
	struct statfs file_system;
	struct stat status;
	uint32_t type;

	disk->holds = true;
	if (fstat(disk->fd, &status) || fstatfs(disk->fd, &file_system))
		return;
	type = (uint32_t)file_system.f_type;
	disk->quick = S_ISREG(status.st_mode) &&
		      (type == TMPFS_MAGIC || type == (uint32_t)HUGETLBFS_MAGIC);
	disk->holds = !S_ISBLK(status.st_mode) && type != EXT4_SUPER_MAGIC && type != XFS &&
		      type != BTRFS_SUPER_MAGIC && type != F2FS;
}

/* What direct I/O on a file has to be aligned to, in memory and in the file: statx(2)
 * (STATX_DIOALIGN, Linux 6.1), or what suits every disk. */
static uint32_t direct_alignment(int fd)
{
	uint32_t alignment = 4096;
#ifdef STATX_DIOALIGN
	struct statx status;

	if (!statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) &&
	    status.stx_mask & STATX_DIOALIGN && status.stx_dio_offset_align) {
		alignment = status.stx_dio_offset_align;
		if (status.stx_dio_mem_align > alignment)
			alignment = status.stx_dio_mem_align;
	}
#else
	(void)fd;
#endif
	return alignment;
}

static int open_file(struct vt_disk *disk, const struct vt_disk_settings *settings)
{
	disk->fd = fcntl(settings->fd, F_DUPFD_CLOEXEC, 0);
	if (disk->fd < 0)
		return -errno;
	look_at_file(disk);
	if (settings->direct_fd < 0)
		return 0;
	disk->direct_fd = fcntl(settings->direct_fd, F_DUPFD_CLOEXEC, 0);
	disk->alignment = direct_alignment(settings->direct_fd);
	return disk->direct_fd < 0 ? -errno : 0;
}

static int open_memory(struct vt_disk *disk, int fd)
{
	int shared = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
	void *at = mmap(NULL, (size_t)disk->size, PROT_READ | PROT_WRITE, shared | MAP_NORESERVE,
			fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	madvise(at, (size_t)disk->size, MADV_DONTFORK);
	/* Random accesses over small pages would mostly wait for the tables. */
	madvise(at, (size_t)disk->size, MADV_HUGEPAGE);
	disk->memory = at;
	disk->mapped = disk->size;
	return 0;
}

int vt_disk_open(const struct vt_disk_settings *settings, struct vt_disk **disk)
{
	uint32_t block = settings->place.block_bytes;
	struct vt_disk *made;
	int result;

	*disk = NULL;
	if (!settings->size || settings->size % VT_SECTOR || settings->offset % VT_SECTOR ||
	    settings->size > (uint64_t)INT64_MAX - settings->offset ||
	    (block && (settings->fd >= 0 || block < VT_SECTOR || block & (block - 1) ||
		       (settings->size | settings->offset) % block)))
		return -EINVAL;
	made = calloc(1, sizeof(*made));
	if (!made)
		return -ENOMEM;
	made->fd = made->direct_fd = -1;
	made->offset = settings->offset;
	made->size = settings->size;
	made->read_only = settings->read_only;
	made->discard = settings->discard;
	memcpy(made->id, settings->id, sizeof(made->id));
	made->place = settings->place;
	if (made->place.block_bytes)
		result = 0;
	else
		result = settings->fd >= 0 && !settings->mapped ? open_file(made, settings) :
								  open_memory(made, settings->fd);
	if (result) {
		vt_disk_close(made);
		return result;
	}
	*disk = made;
	return 0;
}

void vt_disk_close(struct vt_disk *disk)
{
	if (!disk)
		return;
	if (disk->memory)
		munmap(disk->memory, (size_t)disk->mapped);
	if (disk->fd >= 0)
		close(disk->fd);
	if (disk->direct_fd >= 0)
		close(disk->direct_fd);
	free(disk);
}

void vt_disk_resize(struct vt_disk *disk, uint64_t size)
{
	if (disk->memory && size > disk->mapped)
		size = disk->mapped;
	__atomic_store_n(&disk->size, size, __ATOMIC_RELEASE);
}

void vt_disk_mute(struct vt_disk *disk, bool mute)
{
	__atomic_store_n(&disk->muted, mute, __ATOMIC_RELEASE);
}

bool vt_disk_is_muted(const struct vt_disk *disk)
{
	return __atomic_load_n(&disk->muted, __ATOMIC_ACQUIRE);
}

void vt_disk_figures(const struct vt_disk *disk, struct vt_disk_figures *figures)
{
	const uint64_t *from = (const uint64_t *)&disk->figures;
	uint64_t *to = (uint64_t *)figures;

	for (size_t i = 0; i < sizeof(*figures) / sizeof(uint64_t); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
