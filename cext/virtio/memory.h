/* A front end's memory: the regions that it announced, mapped here. Immutable once made.
 *
 * A map is counted: whoever looks into it holds a reference, and a new map is published beside the
 * old one, which goes with its last reference. Nothing in it is trusted: sizes, offsets and
 * overlaps are checked before anything is mapped, and memory that shrinks afterwards breaks the
 * map alone (vt_memory_guard).
 */
#ifndef VT_VIRTIO_MEMORY_H
#define VT_VIRTIO_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* What QEMU announces at most (VHOST_USER_MAX_RAM_SLOTS, and memory slots beside it). */
#define VT_MEMORY_REGIONS 512u
/* Regions that are mapped in a process at once, of all maps; the kernel's own limit on mappings
 * (vm.max_map_count) is about twice that. */
#define VT_MEMORY_ROOM 32768u

struct vt_memory;

/* One region as it is announced (vhost-user, "Memory region description"; VDUSE, vduse_iotlb_entry). */
struct vt_region {
	uint64_t guest;  /* its address in descriptors */
	uint64_t user;   /* its address in the front end, in which ring addresses are given */
	uint64_t size;   /* bytes; not 0 */
	uint64_t offset; /* of its first byte in the file */
	int fd;          /* not kept: the caller closes it */
};

/* Map `count` regions. On success `*memory` holds one reference.
 *
 * Return: 0; -EINVAL for a size of 0, a sum that overflows, regions that overlap (in either
 * address space), or a file that is smaller than what is announced of it; -EOPNOTSUPP for a file on a
 * file system that a program or another host answers for (FUSE, NFS), which could leave whoever
 * touches the memory waiting for ever; -E2BIG for too many regions; -ENOSPC when VT_MEMORY_ROOM are
 * mapped; otherwise the errno of fstat or mmap. Nothing stays mapped after an error.
 */
int vt_memory_create(const struct vt_region *regions, uint32_t count, struct vt_memory **memory);

/* The same for descriptors that are no files whose size could be checked, as VDUSE's: memory that
 * is not there is met as memory that went (vt_memory_guard). */
int vt_memory_create_unsized(const struct vt_region *regions, uint32_t count,
			     struct vt_memory **memory);

/* Take a reference. Return: `memory`. */
struct vt_memory *vt_memory_get(struct vt_memory *memory);

/* Give a reference back; the last one unmaps. `memory` may be NULL. */
void vt_memory_put(struct vt_memory *memory);

/* Where `length` bytes at a guest address lie here, cut where regions end.
 *
 * Return: the number of segments written to `segments`; -EFAULT if a byte lies in no region;
 * -ENOBUFS if there are more than `room`.
 */
int vt_memory_segments(const struct vt_memory *memory, uint64_t guest, uint64_t length,
		       struct iovec *segments, uint32_t room);

/* Copy from guest memory, whatever regions it lies in. Return: 0 or -EFAULT. */
int vt_memory_read(const struct vt_memory *memory, uint64_t guest, void *data, size_t length);

/* Where `length` bytes at a front end's own address lie here: within one region, aligned to
 * `alignment` (a power of two). Return: the address, or NULL. */
void *vt_memory_user(const struct vt_memory *memory, uint64_t user, uint64_t length,
		     uint32_t alignment);

/* The guest address of a byte that vt_memory_segments found. Return: it, or UINT64_MAX. */
uint64_t vt_memory_guest(const struct vt_memory *memory, const void *host);

/* Have devices reach region `index`, in the order of vt_memory_places, at `io` and on: before the
 * map is given to anybody. Return: 0, or -EINVAL. */
int vt_memory_set_io(struct vt_memory *memory, uint32_t index, uint64_t io);

/* Where devices reach a byte that vt_memory_segments found; `*left` bytes from there on lie in its
 * region. Return: the address, or UINT64_MAX. */
uint64_t vt_memory_io(const struct vt_memory *memory, const void *host, uint64_t *left);

/* How many references there are: the requests in flight hold one each. */
uint32_t vt_memory_references(const struct vt_memory *memory);

/* A region as it lies here. */
struct vt_place {
	uint64_t host; /* the address of its first byte in this process */
	uint64_t size; /* bytes */
	uint64_t guest;
};

/* Where the regions lie, by guest address; at most `room` of them are written.
 * Return: how many there are. */
uint32_t vt_memory_places(const struct vt_memory *memory, struct vt_place *places, uint32_t room);

/* Whether some of the memory turned out to be gone (see vt_memory_guard). */
bool vt_memory_is_broken(const struct vt_memory *memory);

/* From now on an access to mapped memory whose file has shrunk meets a page of zeros and marks the
 * map broken, instead of ending the process by SIGBUS. Faults elsewhere go to the handler that was
 * there before. May be called again. Return: 0 or a negative errno.
 */
int vt_memory_guard(void);

#endif
