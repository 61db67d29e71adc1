/* DMA mappings of a type1 container, and what the memory under them needs. */
#ifndef VT_DMA_H
#define VT_DMA_H

#include <stdint.h>

/* `flags` are VFIO_DMA_MAP_FLAG_READ (1) and _WRITE (2), seen from the device. */
int vt_type1_map(int container, uint64_t address, uint64_t iova, uint64_t size, uint32_t flags);
/* `size` goes in as the length and comes back as the bytes unmapped: an empty range succeeds with
 * 0. `flags` may be VFIO_DMA_UNMAP_FLAG_ALL (2) with iova and size 0. */
int vt_type1_unmap(int container, uint64_t iova, uint64_t *size, uint32_t flags);
/* The same for many: `triples` are (address, iova, size). `done` comes back as how many were mapped
 * before the first failure, whose errno is returned. */
int vt_type1_map_many(int container, const uint64_t *triples, uint32_t count, uint32_t flags,
		      uint32_t *done);
/* `pairs` are (iova, size); `unmapped` is the sum of the bytes that were mapped, `done` as above. */
int vt_type1_unmap_many(int container, const uint64_t *pairs, uint32_t count, uint64_t *unmapped,
			uint32_t *done);
/* `start` 1 begins, 0 ends the tracking of pages that devices write. */
int vt_type1_dirty_track(int container, int start);
/* One bit a page of `page_size` bytes into `bitmap`, which holds `bitmap_bytes`. */
int vt_type1_dirty_bitmap(int container, uint64_t iova, uint64_t size, uint64_t page_size,
			  void *bitmap, uint64_t bitmap_bytes);

/* MADV_DONTFORK: a child never shares memory that a device may write. */
int vt_memory_dont_fork(uint64_t address, uint64_t size);
/* In a child: puts zero pages into the hole that MADV_DONTFORK left, so that a stale view reads
 * nothing of value instead of dying. */
int vt_memory_plug(uint64_t address, uint64_t size);

#endif
