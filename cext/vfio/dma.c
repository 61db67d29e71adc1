#define _GNU_SOURCE
#include "vfio/dma.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

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
