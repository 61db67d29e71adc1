#define _GNU_SOURCE
#include "vfio/dma.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

int vt_type1_map(int container, uint64_t address, uint64_t iova, uint64_t size, uint32_t flags)
{
	struct vt_dma_map map = {
		.argsz = sizeof(map),
		.flags = flags,
		.vaddr = address,
		.iova = iova,
		.size = size,
	};

	return vt_ioctl(container, VT_VFIO_IOMMU_MAP_DMA, &map);
}

int vt_type1_unmap(int container, uint64_t iova, uint64_t *size, uint32_t flags)
{
	struct vt_dma_unmap unmap = {
		.argsz = sizeof(unmap),
		.flags = flags,
		.iova = iova,
		.size = *size,
	};
	int result = vt_ioctl(container, VT_VFIO_IOMMU_UNMAP_DMA, &unmap);

	*size = unmap.size;
	return result;
}

int vt_type1_map_many(int container, const uint64_t *triples, uint32_t count, uint32_t flags,
		      uint32_t *done)
{
	for (*done = 0; *done < count; ++*done, triples += 3) {
		int result = vt_type1_map(container, triples[0], triples[1], triples[2], flags);

		if (result < 0)
			return result;
	}
	return 0;
}

int vt_type1_unmap_many(int container, const uint64_t *pairs, uint32_t count, uint64_t *unmapped,
			uint32_t *done)
{
	*unmapped = 0;
	for (*done = 0; *done < count; ++*done, pairs += 2) {
		uint64_t size = pairs[1];
		int result = vt_type1_unmap(container, pairs[0], &size, 0);

		if (result < 0)
			return result;
		*unmapped += size;
	}
	return 0;
}

int vt_type1_dirty_track(int container, int start)
{
	struct vt_group_status request = {
		.argsz = sizeof(request),
		.flags = start ? VT_DIRTY_START : VT_DIRTY_STOP,
	};

	return vt_ioctl(container, VT_VFIO_IOMMU_DIRTY_PAGES, &request);
}

int vt_type1_dirty_bitmap(int container, uint64_t iova, uint64_t size, uint64_t page_size,
			  void *bitmap, uint64_t bitmap_bytes)
{
	struct vt_dirty_get request = {
		.argsz = sizeof(request),
		.flags = VT_DIRTY_GET_BITMAP,
		.iova = iova,
		.size = size,
		.page_size = page_size,
		.bitmap_bytes = bitmap_bytes,
		.bitmap = (uint64_t)(uintptr_t)bitmap,
	};

	return vt_ioctl(container, VT_VFIO_IOMMU_DIRTY_PAGES, &request);
}

int vt_memory_dont_fork(uint64_t address, uint64_t size)
{
	int result = vt_fault_point();

	if (result)
		return result;
	return madvise((void *)(uintptr_t)address, size, MADV_DONTFORK) ? -errno : 0;
}

int vt_memory_plug(uint64_t address, uint64_t size)
{
	void *wanted = (void *)(uintptr_t)address;
	void *got = mmap(wanted, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (got == MAP_FAILED)
		return -errno;
	if (got != wanted) {
		munmap(got, size);
		return -EEXIST;
	}
	return 0;
}
