#include "vfio/iommufd.h"

#include <errno.h>
#include <stddef.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

int vt_iommufd_ioas_alloc(int iommufd, uint32_t *ioas)
{
	struct vt_ioas_alloc request = { .size = sizeof(request) };
	int result = vt_ioctl(iommufd, VT_IOMMU_IOAS_ALLOC, &request);

	*ioas = request.out_ioas_id;
	return result;
}

int vt_iommufd_destroy(int iommufd, uint32_t id)
{
	struct vt_iommu_destroy request = { .size = sizeof(request), .id = id };

	return vt_ioctl(iommufd, VT_IOMMU_DESTROY, &request);
}

int vt_iommufd_ranges(int iommufd, uint32_t ioas, uint64_t *ranges, uint32_t room, uint32_t *count,
		      uint64_t *alignment)
{
	struct vt_ioas_iova_ranges request = {
		.size = sizeof(request),
		.ioas_id = ioas,
		.num_iovas = room,
		.allowed_iovas = (uint64_t)(uintptr_t)ranges,
	};
	int result = vt_ioctl(iommufd, VT_IOMMU_IOAS_IOVA_RANGES, &request);

	*count = request.num_iovas;
	*alignment = request.out_iova_alignment;
	return result;
}

int vt_iommufd_dirty_hwpt(int iommufd, uint32_t devid, uint32_t ioas, uint32_t *hwpt)
{
	struct vt_hwpt_alloc request = {
		.size = sizeof(request),
		.flags = VT_HWPT_ALLOC_DIRTY_TRACKING,
		.dev_id = devid,
		.pt_id = ioas,
	};
	int result = vt_ioctl(iommufd, VT_IOMMU_HWPT_ALLOC, &request);

	*hwpt = request.out_hwpt_id;
	return result;
}

int vt_iommufd_dirty_track(int iommufd, uint32_t hwpt, int start)
{
	struct vt_hwpt_set_dirty request = {
		.size = sizeof(request),
		.flags = start ? 1 : 0,
		.hwpt_id = hwpt,
	};

	return vt_ioctl(iommufd, VT_IOMMU_HWPT_SET_DIRTY, &request);
}

int vt_iommufd_dirty_bitmap(int iommufd, uint32_t hwpt, uint64_t iova, uint64_t size,
			    uint64_t page_size, void *bitmap)
{
	struct vt_hwpt_get_dirty request = {
		.size = sizeof(request),
		.hwpt_id = hwpt,
		.iova = iova,
		.length = size,
		.page_size = page_size,
		.data = (uint64_t)(uintptr_t)bitmap,
	};

	return vt_ioctl(iommufd, VT_IOMMU_HWPT_GET_DIRTY, &request);
}

int vt_cdev_bind(int device, int iommufd, uint32_t *devid)
{
	struct vt_bind_iommufd request = { .argsz = sizeof(request), .iommufd = iommufd };
	int result = vt_ioctl(device, VT_VFIO_DEVICE_BIND_IOMMUFD, &request);

	*devid = request.out_devid;
	return result;
}

int vt_cdev_attach(int device, uint32_t pt)
{
	struct vt_attach_pt request = { .argsz = sizeof(request), .pt_id = pt };

	return vt_ioctl(device, VT_VFIO_DEVICE_ATTACH_PT, &request);
}

int vt_cdev_detach(int device)
{
	struct vt_detach_pt request = { .argsz = sizeof(request) };

	return vt_ioctl(device, VT_VFIO_DEVICE_DETACH_PT, &request);
}
