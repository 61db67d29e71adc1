#include "vfio/migration.h"

#include <errno.h>
#include <unistd.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

#define VT_VFIO_MIG_GET_PRECOPY_INFO VT_VFIO_IO(21)

struct vt_precopy_info_args {
	uint32_t argsz, flags;
	uint64_t initial_bytes, dirty_bytes;
};
VT_ASSERT_SIZE(struct vt_precopy_info_args, 24);

int vt_precopy_info(int data, uint64_t *initial_bytes, uint64_t *dirty_bytes)
{
	struct vt_precopy_info_args info = { .argsz = sizeof(info) };
	int result = vt_ioctl(data, VT_VFIO_MIG_GET_PRECOPY_INFO, &info);

	*initial_bytes = info.initial_bytes;
	*dirty_bytes = info.dirty_bytes;
	return result > 0 ? 0 : result;
}

int64_t vt_data_read(int data, void *buffer, uint64_t length)
{
	int64_t result = vt_fault_point();

	if (result)
		return result;
	result = read(data, buffer, length);
	return result < 0 ? -errno : result;
}

int64_t vt_data_write(int data, const void *buffer, uint64_t length)
{
	int64_t result = vt_fault_point();

	if (result)
		return result;
	result = write(data, buffer, length);
	return result < 0 ? -errno : result;
}
