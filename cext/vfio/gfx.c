#include "vfio/gfx.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "vfio/ioctl.h"
#include "vfio/uapi_compat.h"

VT_ASSERT_SIZE(struct vt_gfx_plane, 64);

#define VT_DMA_BUF_SYNC _IOW('b', 0, uint64_t)
#define VT_DMA_BUF_SYNC_READ 1u
#define VT_DMA_BUF_SYNC_END 4u

int vt_gfx_plane(int device, uint32_t flags, uint32_t plane_type, struct vt_gfx_plane *plane)
{
	int result;

	memset(plane, 0, sizeof(*plane));
	plane->argsz = sizeof(*plane);
	plane->flags = flags;
	plane->plane_type = plane_type;
	result = vt_ioctl(device, VT_VFIO_DEVICE_QUERY_GFX_PLANE, plane);
	return result > 0 ? 0 : result;
}

int vt_gfx_dmabuf(int device, uint32_t id)
{
	int fd = vt_ioctl(device, VT_VFIO_DEVICE_GET_GFX_DMABUF, &id);

	/* Drivers choose the flags of the descriptor, and mbochs chooses none. */
	if (fd >= 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
		int error = errno;

		vt_close(fd);
		return -error;
	}
	return fd;
}

int vt_dmabuf_read_sync(int dmabuf, int begin)
{
	uint64_t flags = VT_DMA_BUF_SYNC_READ | (begin ? 0 : VT_DMA_BUF_SYNC_END);

	return vt_ioctl(dmabuf, VT_DMA_BUF_SYNC, &flags);
}
