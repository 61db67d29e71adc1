/* What devices wrote through a type1 container, and what memory under mappings needs. Each function
 * returns 0 or -errno. */
#ifndef VT_DMA_H
#define VT_DMA_H

#include <stdint.h>

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
