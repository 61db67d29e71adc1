/* How much a device may do: requests and bytes a second, and its share of a group's.
 *
 * Limits are token buckets that hold integer nanoseconds: a bucket knows when it will be full again,
 * and may run ahead of the clock by its burst. What is taken is charged after it was fetched, so a
 * request larger than the burst passes and is paid for afterwards. Members of a group that wait for
 * its bucket are served in the proportion of their weights; what one leaves is the others'.
 *
 * The clock is the caller's: `now` is nanoseconds that never run backwards. Shares and groups are
 * counted, and may be used and changed by any thread.
 */
#ifndef VT_VIRTIO_LIMITS_H
#define VT_VIRTIO_LIMITS_H

#include <stdbool.h>
#include <stdint.h>

#define VT_WEIGHT 100u /* of a share that nobody gave one */

struct vt_group;
struct vt_share;

struct vt_rate {
	uint64_t requests; /* a second, at most; 0: not limited */
	uint64_t bytes;    /* a second, at most; 0: not limited */
	uint64_t burst_ns; /* what may be saved up while idle, as a time at these rates */
};

/* What was taken and is not earned yet: what a bucket holds less than its burst, and beyond that its
 * debt. For whoever goes on with the same limits in another process. */
struct vt_level {
	uint64_t requests_ns, bytes_ns; /* times at its rates */
	uint64_t typical;               /* bytes of a request, as of late; of a group 0 */
};

/* One queue's place in the line for its group's bucket; zeroed before its first use. */
struct vt_turn {
	bool waiting;
};

/* Make a group whose bucket is empty. Return: 0 or -ENOMEM. */
int vt_group_create(const struct vt_rate *rate, uint64_t now, struct vt_group **group);

/* Change a group's limit; debts that the new one would have paid sooner are cut. */
void vt_group_set(struct vt_group *group, const struct vt_rate *rate, uint64_t now);

void vt_group_level(struct vt_group *group, uint64_t now, struct vt_level *level);

/* Go on from a level, as it was at `now`; what is not limited has none. */
void vt_group_set_level(struct vt_group *group, const struct vt_level *level, uint64_t now);

/* Give a reference back. `group` may be NULL; shares in it keep theirs. */
void vt_group_put(struct vt_group *group);

/* Make a share that is limited by nothing. Return: 0 or -ENOMEM. */
int vt_share_create(struct vt_share **share);

struct vt_share *vt_share_get(struct vt_share *share);
void vt_share_put(struct vt_share *share);

/* Change what limits a share: its own rate, its weight (at least 1) and its group, or NULL. */
void vt_share_set(struct vt_share *share, const struct vt_rate *rate, uint32_t weight,
		  struct vt_group *group, uint64_t now);

/* A share's own level, without its group's, as vt_group_level has it. */
void vt_share_level(struct vt_share *share, uint64_t now, struct vt_level *level);
void vt_share_set_level(struct vt_share *share, const struct vt_level *level, uint64_t now);

uint32_t vt_share_weight(const struct vt_share *share);

/* How often a queue of this share had to wait for its limits. */
uint64_t vt_share_waits(const struct vt_share *share);

/* How many of `waiting` requests may be fetched now.
 * Return: their number; 0: none before `*wait_ns` have passed. */
uint32_t vt_share_ask(struct vt_share *share, struct vt_turn *turn, uint32_t waiting, uint64_t now,
		      uint64_t *wait_ns);

/* Charge what was fetched. */
void vt_share_took(struct vt_share *share, uint32_t requests, uint64_t bytes, uint64_t now);

/* A queue that may be waiting goes. */
void vt_share_leave(struct vt_share *share, struct vt_turn *turn);

#endif
