#define _FILE_OFFSET_BITS 64
#include "vfio/vfio.h"

#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

#define VT_FEATURE_MAX 4096u
#define VT_RESET_FDS_MAX 1024u

static int plain(int result)
{
	return result > 0 ? 0 : result;
}

int vt_container_version(int container)
{
	return vt_ioctl(container, VT_VFIO_GET_API_VERSION, NULL);
}

int vt_container_check(int container, int extension)
{
	return vt_ioctl(container, VT_VFIO_CHECK_EXTENSION, (void *)(intptr_t)extension);
}

int vt_container_set_iommu(int container, int type)
{
	return plain(vt_ioctl(container, VT_VFIO_SET_IOMMU, (void *)(intptr_t)type));
}

int vt_type1_info(int container, void *buffer, uint32_t size)
{
	return vt_info(container, VT_VFIO_IOMMU_GET_INFO, sizeof(struct vt_type1_info), 0, 0,
		       buffer, size);
}

int vt_group_status(int group, uint32_t *flags)
{
	struct vt_group_status status = { .argsz = sizeof(status) };
	int result = vt_ioctl(group, VT_VFIO_GROUP_GET_STATUS, &status);

	*flags = status.flags;
	return plain(result);
}

int vt_group_set_container(int group, int container)
{
	int32_t fd = container;

	return plain(vt_ioctl(group, VT_VFIO_GROUP_SET_CONTAINER, &fd));
}

int vt_group_unset_container(int group)
{
	return plain(vt_ioctl(group, VT_VFIO_GROUP_UNSET_CONTAINER, NULL));
}

int vt_group_device(int group, const char *name)
{
	return vt_ioctl(group, VT_VFIO_GROUP_GET_DEVICE_FD, (void *)(uintptr_t)name);
}

int vt_device_info(int device, void *buffer, uint32_t size)
{
	return vt_info(device, VT_VFIO_DEVICE_GET_INFO, sizeof(struct vt_device_info), 0, 0, buffer,
		       size);
}

int vt_region_info(int device, uint32_t index, void *buffer, uint32_t size)
{
	return vt_info(device, VT_VFIO_DEVICE_GET_REGION_INFO, sizeof(struct vt_region_info),
		       offsetof(struct vt_region_info, index), index, buffer, size);
}

int vt_irq_info(int device, uint32_t index, uint32_t *flags, uint32_t *count)
{
	struct vt_irq_info info = { .argsz = sizeof(info), .index = index };
	int result = vt_ioctl(device, VT_VFIO_DEVICE_GET_IRQ_INFO, &info);

	*flags = info.flags;
	*count = info.count;
	return plain(result);
}

int vt_device_reset(int device)
{
	return plain(vt_ioctl(device, VT_VFIO_DEVICE_RESET, NULL));
}

int vt_hot_reset_info(int device, void *buffer, uint32_t size)
{
	struct vt_hot_reset_info *info = buffer;
	int result;

	if (size < sizeof(*info))
		return -EINVAL;
	memset(buffer, 0, size);
	info->argsz = size;
	result = vt_ioctl(device, VT_VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, info);
	/* ENOSPC still tells the count: the caller then comes with a larger buffer. */
	return plain(result);
}

int vt_hot_reset(int device, const int32_t *group_fds, uint32_t count)
{
	struct vt_hot_reset *reset;
	size_t size = sizeof(*reset) + sizeof(int32_t) * (size_t)count;
	int result;

	if (count > VT_RESET_FDS_MAX)
		return -EINVAL;
	reset = calloc(1, size);
	if (!reset)
		return -ENOMEM;
	reset->argsz = (uint32_t)size;
	reset->count = count;
	if (count)
		memcpy(reset->group_fds, group_fds, sizeof(int32_t) * (size_t)count);
	result = vt_ioctl(device, VT_VFIO_DEVICE_PCI_HOT_RESET, reset);
	free(reset);
	return plain(result);
}

int vt_device_feature(int device, uint32_t flags, void *data, uint32_t length)
{
	struct vt_feature *feature;
	int result;

	if (length > VT_FEATURE_MAX)
		return -EINVAL;
	feature = calloc(1, sizeof(*feature) + length);
	if (!feature)
		return -ENOMEM;
	feature->argsz = (uint32_t)sizeof(*feature) + length;
	feature->flags = flags;
	if (length)
		memcpy(feature->data, data, length);
	result = vt_ioctl(device, VT_VFIO_DEVICE_FEATURE, feature);
	if (result >= 0 && length)
		memcpy(data, feature->data, length);
	free(feature);
	return result;
}

static int whole(ssize_t moved, uint64_t wanted)
{
	if (moved < 0)
		return -errno;
	return (uint64_t)moved == wanted ? 0 : -EIO;
}

static int exact_width(uint32_t width)
{
	return width == 1 || width == 2 || width == 4 || width == 8;
}

int vt_region_read(int device, uint64_t position, uint32_t width, uint64_t *value)
{
	uint64_t raw = 0;
	int result = vt_fault_point();

	if (result)
		return result;
	if (!exact_width(width))
		return -EINVAL;
	result = whole(pread(device, &raw, width, (off_t)position), width);
	/* The device's bytes came in at the low addresses: as a little-endian 64-bit number. */
	*value = le64toh(raw);
	return result;
}

int vt_region_write(int device, uint64_t position, uint32_t width, uint64_t value)
{
	uint64_t raw = htole64(value);
	int result = vt_fault_point();

	if (result)
		return result;
	if (!exact_width(width))
		return -EINVAL;
	return whole(pwrite(device, &raw, width, (off_t)position), width);
}

int vt_region_copy_out(int device, uint64_t position, void *buffer, uint64_t length)
{
	int result = vt_fault_point();

	return result ? result : whole(pread(device, buffer, length, (off_t)position), length);
}

int vt_region_copy_in(int device, uint64_t position, const void *buffer, uint64_t length)
{
	int result = vt_fault_point();

	return result ? result : whole(pwrite(device, buffer, length, (off_t)position), length);
}
