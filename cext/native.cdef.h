/* What vfio/native.py sees of the C library: the headers of this directory, without their
 * comments. Read by cffi (build.py), which compiles it against the real headers. */

/* ioctl.h */
int vt_open(const char *path);
int vt_close(int fd);
long vt_fault_set(long nth, int error);

/* vfio.h */
int vt_container_version(int container);
int vt_container_check(int container, int extension);
int vt_container_set_iommu(int container, int type);
int vt_type1_info(int container, void *buffer, uint32_t size);
int vt_group_status(int group, uint32_t *flags);
int vt_group_set_container(int group, int container);
int vt_group_unset_container(int group);
int vt_group_device(int group, const char *name);
int vt_device_info(int device, void *buffer, uint32_t size);
int vt_region_info(int device, uint32_t index, void *buffer, uint32_t size);
int vt_irq_info(int device, uint32_t index, uint32_t *flags, uint32_t *count);
int vt_device_reset(int device);
int vt_hot_reset_info(int device, void *buffer, uint32_t size);
int vt_hot_reset(int device, const int32_t *group_fds, uint32_t count);
int vt_device_feature(int device, uint32_t flags, void *data, uint32_t length);
int vt_region_read(int device, uint64_t position, uint32_t width, uint64_t *value);
int vt_region_write(int device, uint64_t position, uint32_t width, uint64_t value);
int vt_region_copy_out(int device, uint64_t position, void *buffer, uint64_t length);
int vt_region_copy_in(int device, uint64_t position, const void *buffer, uint64_t length);

/* dma.h */
int vt_type1_map(int container, uint64_t address, uint64_t iova, uint64_t size, uint32_t flags);
int vt_type1_unmap(int container, uint64_t iova, uint64_t *size, uint32_t flags);
int vt_type1_dirty_track(int container, int start);
int vt_type1_dirty_bitmap(int container, uint64_t iova, uint64_t size, uint64_t page_size,
                          void *bitmap, uint64_t bitmap_bytes);
int vt_memory_dont_fork(uint64_t address, uint64_t size);
int vt_memory_plug(uint64_t address, uint64_t size);

/* iommufd.h */
int vt_iommufd_ioas_alloc(int iommufd, uint32_t *ioas);
int vt_iommufd_destroy(int iommufd, uint32_t id);
int vt_iommufd_ranges(int iommufd, uint32_t ioas, uint64_t *ranges, uint32_t room,
                      uint32_t *count, uint64_t *alignment);
int vt_iommufd_map(int iommufd, uint32_t ioas, uint64_t address, uint64_t iova, uint64_t size,
                   uint32_t flags);
int vt_iommufd_unmap(int iommufd, uint32_t ioas, uint64_t iova, uint64_t *size);
int vt_iommufd_dirty_hwpt(int iommufd, uint32_t devid, uint32_t ioas, uint32_t *hwpt);
int vt_iommufd_dirty_track(int iommufd, uint32_t hwpt, int start);
int vt_iommufd_dirty_bitmap(int iommufd, uint32_t hwpt, uint64_t iova, uint64_t size,
                            uint64_t page_size, void *bitmap);
int vt_cdev_bind(int device, int iommufd, uint32_t *devid);
int vt_cdev_attach(int device, uint32_t pt);
int vt_cdev_detach(int device);

/* irq.h */
int vt_irq_assign(int device, uint32_t index, uint32_t start, const int32_t *fds, uint32_t count);
int vt_irq_action(int device, uint32_t index, uint32_t start, uint32_t count, uint32_t action);
int vt_irq_unmask_fd(int device, uint32_t index, int32_t fd);
int vt_eventfd(void);
int vt_eventfd_wait(int fd, int timeout_ms, uint64_t spin_ns, uint64_t *signals);
