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
int vt_type1_map_many(int container, const uint64_t *triples, uint32_t count, uint32_t flags,
                      uint32_t *done);
int vt_type1_unmap_many(int container, const uint64_t *pairs, uint32_t count, uint64_t *unmapped);
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
int vt_iommufd_map_many(int iommufd, uint32_t ioas, const uint64_t *triples, uint32_t count,
                        uint32_t flags, uint32_t *done);
int vt_iommufd_unmap_many(int iommufd, uint32_t ioas, const uint64_t *pairs, uint32_t count,
                          uint64_t *unmapped);
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

/* nvme_queue.h */
struct vt_nvme_queue;

struct vt_nvme_layout {
        uint64_t submission;
        uint64_t completion;
        uint64_t tail_doorbell;
        uint64_t head_doorbell;
        uint64_t tail_shadow;
        uint64_t head_shadow;
        uint64_t tail_event;
        uint64_t head_event;
        uint64_t lists;
        uint64_t lists_iova;
        uint32_t sq_entries;
        uint32_t cq_entries;
        uint32_t page_size;
        uint32_t id;
        uint32_t lazy;
};

struct vt_nvme_io {
        uint64_t tag;
        uint64_t lba;
        uint64_t iova;
        uint32_t bytes;
        uint32_t blocks;
        uint32_t nsid;
        uint16_t control;
        uint8_t opcode;
        uint8_t reserved;
};

struct vt_nvme_done {
        uint64_t tag;
        uint64_t latency_ns;
        uint32_t result;
        uint16_t status;
        uint16_t cid;
};

struct vt_nvme_counters {
        uint64_t submitted, completed, failed;
        uint64_t tail_writes, head_writes;
        uint32_t in_flight, depth;
};

int vt_nvme_new(const struct vt_nvme_layout *layout, struct vt_nvme_queue **queue);

int vt_nvme_stop(struct vt_nvme_queue *queue);
void vt_nvme_free(struct vt_nvme_queue *queue);

void vt_nvme_halt(struct vt_nvme_queue *queue);

int vt_nvme_submit(struct vt_nvme_queue *queue, const struct vt_nvme_io *ios, uint32_t count);

int vt_nvme_submit_many(struct vt_nvme_queue *queue, const struct vt_nvme_io *pattern,
                        const uint64_t *lbas, const uint64_t *tags, uint32_t count,
                        uint64_t stride, uint64_t slots);

int vt_nvme_submit_raw(struct vt_nvme_queue *queue, const void *command, uint64_t tag);

int vt_nvme_poll(struct vt_nvme_queue *queue, struct vt_nvme_done *done, uint32_t room,
                 uint32_t least, uint64_t timeout_ns);

int vt_nvme_poll_tags(struct vt_nvme_queue *queue, uint64_t *tags, uint32_t room, uint32_t least,
                      uint64_t timeout_ns, uint32_t *status);

void vt_nvme_count(const struct vt_nvme_queue *queue, struct vt_nvme_counters *counters);

/* nvme_load.h */
#define VT_NVME_BUCKETS 1920

struct vt_nvme_job {
        uint64_t first_lba, span;
        uint64_t iova, stride;
        uint64_t runtime_ns, limit;
        uint64_t seed;
        uint32_t depth, batch;
        uint32_t blocks, bytes, nsid;
        uint32_t random;
        uint32_t read_percent;
        uint32_t reserved;
};

struct vt_nvme_report {
        uint64_t reads, writes, failed;
        uint64_t elapsed_ns, latency_min_ns, latency_max_ns, latency_sum_ns;
        uint64_t tail_writes, head_writes;
        uint32_t first_status;
        uint32_t reserved;
        uint64_t histogram[VT_NVME_BUCKETS];
};

int vt_nvme_run(struct vt_nvme_queue *queue, const struct vt_nvme_job *job,
                struct vt_nvme_report *report);

uint64_t vt_nvme_bucket_floor(uint32_t bucket);
uint32_t vt_nvme_bucket(uint64_t nanoseconds);

/* gfx.h */
struct vt_gfx_plane {
        uint32_t argsz, flags, plane_type, drm_format;
        uint64_t drm_format_modifier;
        uint32_t width, height, stride, size;
        uint32_t x_pos, y_pos, x_hot, y_hot;
        uint32_t where;
        uint32_t reserved;
};
int vt_gfx_plane(int device, uint32_t flags, uint32_t plane_type, struct vt_gfx_plane *plane);
int vt_gfx_dmabuf(int device, uint32_t id);
int vt_dmabuf_read_sync(int dmabuf, int begin);

/* migration.h */
int vt_precopy_info(int data, uint64_t *initial_bytes, uint64_t *dirty_bytes);
int64_t vt_data_read(int data, void *buffer, uint64_t length);
int64_t vt_data_write(int data, const void *buffer, uint64_t length);
