/* The data file of a device's migration. <linux/vfio.h>, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE. */
#ifndef VT_MIGRATION_H
#define VT_MIGRATION_H

#include <stdint.h>

/* How much is left to read in the pre-copy phase, as VFIO_MIG_GET_PRECOPY_INFO estimates it. */
int vt_precopy_info(int data, uint64_t *initial_bytes, uint64_t *dirty_bytes);
/* One read(2) or write(2): the bytes moved or -errno. The data file takes no positions. */
int64_t vt_data_read(int data, void *buffer, uint64_t length);
int64_t vt_data_write(int data, const void *buffer, uint64_t length);

#endif
