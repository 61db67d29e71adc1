#include "virtio/limits.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#define SECOND 1000000000u
/* Waiting for less than this is not worth a timer; so much is gathered first. */
#define SLICE_NS 1000000u
/* One charge at most: a request of 4 GiB at a byte a second must not overflow anything. */
#define LONGEST_NS (1ull << 40)
/* A member that did not come back so long after its time no longer holds the others up. */
#define PATIENCE_NS 20000000u
/* A weight of 1024 makes virtual time run as fast as real time. */
#define VIRTUAL 1024u

struct bucket {
	struct vt_rate rate;
	/* When what was taken will have been earned, of requests and of bytes. */
	uint64_t requests_at, bytes_at;
};

struct vt_group {
	pthread_mutex_t lock;
	uint32_t references;
	struct bucket bucket;
	uint64_t virtual_time; /* of the member that is furthest behind */
	struct vt_share *members;
};

struct vt_share {
	pthread_mutex_t lock;  /* taken before the group's */
	uint32_t references;
	bool limited;          /* read without the lock */
	uint32_t weight;
	struct bucket bucket;
	uint64_t typical;      /* bytes of a request, as of late */
	uint64_t waits;
	struct vt_group *group;
	/* Under the group's lock: */
	struct vt_share *next;
	uint64_t virtual_time; /* what it took of the group, by its weight */
	uint64_t due;          /* when it will ask again */
	uint32_t waiting;      /* queues that got less of the group's bucket than they wanted */
};

static uint64_t cost_ns(uint64_t amount, uint64_t rate)
{
	unsigned __int128 cost = ((unsigned __int128)amount * SECOND + rate - 1) / rate;

	return cost > LONGEST_NS ? LONGEST_NS : (uint64_t)cost;
}

static uint64_t later(uint64_t one, uint64_t other)
{
	return one > other ? one : other;
}

static uint64_t slice(const struct bucket *bucket)
{
	return bucket->rate.burst_ns / 2 < SLICE_NS ? bucket->rate.burst_ns / 2 : SLICE_NS;
}

/* Of one dimension: how many requests of `cost` may go. Return: 0: none before `*wait`. */
static uint64_t room(const struct bucket *bucket, uint64_t at, uint64_t cost, uint64_t now,
		     uint64_t *wait)
{
	uint64_t limit = now + bucket->rate.burst_ns;

	at = later(at, now);
	if (at > limit) {
		*wait = later(*wait, at - limit + slice(bucket));
		return 0;
	}
	return 1 + (limit - at) / (cost ? cost : 1);
}

static uint32_t bucket_room(const struct bucket *bucket, uint64_t typical, uint32_t most,
			    uint64_t now, uint64_t *wait)
{
	uint64_t found = most, one;

	if (bucket->rate.requests) {
		one = room(bucket, bucket->requests_at, cost_ns(1, bucket->rate.requests), now, wait);
		found = one < found ? one : found;
	}
	if (bucket->rate.bytes) {
		one = room(bucket, bucket->bytes_at, cost_ns(typical, bucket->rate.bytes), now, wait);
		found = one < found ? one : found;
	}
	return (uint32_t)found;
}

/* Return: the time that it cost, in the dimension that is shorter of it. */
static uint64_t charge(struct bucket *bucket, uint32_t requests, uint64_t bytes, uint64_t now)
{
	uint64_t first = 0, second = 0;

	if (bucket->rate.requests) {
		first = cost_ns(requests, bucket->rate.requests);
		bucket->requests_at = later(bucket->requests_at, now) + first;
	}
	if (bucket->rate.bytes) {
		second = cost_ns(bytes, bucket->rate.bytes);
		bucket->bytes_at = later(bucket->bytes_at, now) + second;
	}
	return later(first, second);
}

/* A dimension's time under another rate. One that was not limited begins with nothing saved up. A
 * debt, which lies beyond the burst, is the same number of requests or bytes, but no longer. */
static uint64_t changed(uint64_t at, uint64_t old_rate, uint64_t old_burst, uint64_t rate,
			uint64_t burst, uint64_t now)
{
	uint64_t debt;

	if (!rate)
		return 0;
	if (!old_rate)
		return now + burst;
	if (at <= now + old_burst)
		return at < now + burst ? at : now + burst;
	debt = at - (now + old_burst);
	if (rate > old_rate)
		debt = (uint64_t)((unsigned __int128)debt * old_rate / rate);
	return now + burst + debt;
}

static void set(struct bucket *bucket, const struct vt_rate *rate, uint64_t now)
{
	const struct vt_rate old = bucket->rate;

	bucket->requests_at = changed(bucket->requests_at, old.requests, old.burst_ns,
				      rate->requests, rate->burst_ns, now);
	bucket->bytes_at = changed(bucket->bytes_at, old.bytes, old.burst_ns, rate->bytes,
				   rate->burst_ns, now);
	bucket->rate = *rate;
}

static void get_level(const struct bucket *bucket, uint64_t now, struct vt_level *level)
{
	level->requests_ns = later(bucket->requests_at, now) - now;
	level->bytes_ns = later(bucket->bytes_at, now) - now;
}

/* No more than one charge can have made of it. */
static uint64_t bounded(const struct bucket *bucket, uint64_t level)
{
	uint64_t most = bucket->rate.burst_ns + LONGEST_NS;

	return level < most ? level : most;
}

static void set_level(struct bucket *bucket, const struct vt_level *level, uint64_t now)
{
	if (bucket->rate.requests)
		bucket->requests_at = now + bounded(bucket, level->requests_ns);
	if (bucket->rate.bytes)
		bucket->bytes_at = now + bounded(bucket, level->bytes_ns);
}

int vt_group_create(const struct vt_rate *rate, uint64_t now, struct vt_group **group)
{
	struct vt_group *made = calloc(1, sizeof(*made));

	*group = made;
	if (!made)
		return -ENOMEM;
	pthread_mutex_init(&made->lock, NULL);
	made->references = 1;
	set(&made->bucket, rate, now);
	return 0;
}

void vt_group_set(struct vt_group *group, const struct vt_rate *rate, uint64_t now)
{
	pthread_mutex_lock(&group->lock);
	set(&group->bucket, rate, now);
	pthread_mutex_unlock(&group->lock);
}

void vt_group_level(struct vt_group *group, uint64_t now, struct vt_level *level)
{
	pthread_mutex_lock(&group->lock);
	get_level(&group->bucket, now, level);
	level->typical = 0;
	pthread_mutex_unlock(&group->lock);
}

void vt_group_set_level(struct vt_group *group, const struct vt_level *level, uint64_t now)
{
	pthread_mutex_lock(&group->lock);
	set_level(&group->bucket, level, now);
	pthread_mutex_unlock(&group->lock);
}

static struct vt_group *group_get(struct vt_group *group)
{
	if (group)
		__atomic_add_fetch(&group->references, 1, __ATOMIC_RELAXED);
	return group;
}

void vt_group_put(struct vt_group *group)
{
	if (!group || __atomic_sub_fetch(&group->references, 1, __ATOMIC_ACQ_REL))
		return;
	pthread_mutex_destroy(&group->lock);
	free(group);
}

int vt_share_create(struct vt_share **share)
{
	struct vt_share *made = calloc(1, sizeof(*made));

	*share = made;
	if (!made)
		return -ENOMEM;
	pthread_mutex_init(&made->lock, NULL);
	made->references = 1;
	made->weight = VT_WEIGHT;
	return 0;
}

struct vt_share *vt_share_get(struct vt_share *share)
{
	__atomic_add_fetch(&share->references, 1, __ATOMIC_RELAXED);
	return share;
}

/* Take a share out of its group or put it into another; the share is locked. */
static void join(struct vt_share *share, struct vt_group *group)
{
	struct vt_group *old = share->group;

	if (old == group)
		return;
	if (old) {
		pthread_mutex_lock(&old->lock);
		for (struct vt_share **at = &old->members; *at; at = &(*at)->next)
			if (*at == share) {
				*at = share->next;
				break;
			}
		pthread_mutex_unlock(&old->lock);
	}
	share->group = group_get(group);
	share->next = NULL;
	if (group) {
		pthread_mutex_lock(&group->lock);
		share->virtual_time = group->virtual_time;
		share->next = group->members;
		group->members = share;
		pthread_mutex_unlock(&group->lock);
	}
	vt_group_put(old);
}

void vt_share_put(struct vt_share *share)
{
	if (!share || __atomic_sub_fetch(&share->references, 1, __ATOMIC_ACQ_REL))
		return;
	join(share, NULL);
	pthread_mutex_destroy(&share->lock);
	free(share);
}

void vt_share_set(struct vt_share *share, const struct vt_rate *rate, uint32_t weight,
		  struct vt_group *group, uint64_t now)
{
	pthread_mutex_lock(&share->lock);
	set(&share->bucket, rate, now);
	__atomic_store_n(&share->weight, weight ? weight : 1, __ATOMIC_RELAXED);
	join(share, group);
	__atomic_store_n(&share->limited, rate->requests || rate->bytes || group, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&share->lock);
}

void vt_share_level(struct vt_share *share, uint64_t now, struct vt_level *level)
{
	pthread_mutex_lock(&share->lock);
	get_level(&share->bucket, now, level);
	level->typical = share->typical;
	pthread_mutex_unlock(&share->lock);
}

void vt_share_set_level(struct vt_share *share, const struct vt_level *level, uint64_t now)
{
	pthread_mutex_lock(&share->lock);
	set_level(&share->bucket, level, now);
	share->typical = level->typical;
	pthread_mutex_unlock(&share->lock);
}

uint32_t vt_share_weight(const struct vt_share *share)
{
	return __atomic_load_n(&share->weight, __ATOMIC_RELAXED);
}

uint64_t vt_share_waits(const struct vt_share *share)
{
	return __atomic_load_n(&share->waits, __ATOMIC_RELAXED);
}

/* What a member may take before those that wait must have had theirs. The group is locked.
 * Return: 0: it is ahead of them. */
static uint64_t turn_room(struct vt_group *group, const struct vt_share *share, uint64_t now)
{
	const struct bucket *bucket = &group->bucket;
	uint64_t last = share->virtual_time, weights = share->weight, ahead, may, cost = 1;

	for (const struct vt_share *other = group->members; other; other = other->next) {
		if (other == share || !other->waiting || now > other->due + PATIENCE_NS)
			continue;
		weights += vt_share_weight(other);
		if (other->virtual_time < last)
			last = other->virtual_time;
	}
	group->virtual_time = later(group->virtual_time, last);
	ahead = share->virtual_time - last;
	may = (uint64_t)SLICE_NS * VIRTUAL / weights;
	if (ahead > may)
		return 0;
	if (bucket->rate.requests)
		cost = later(cost, cost_ns(1, bucket->rate.requests));
	if (bucket->rate.bytes)
		cost = later(cost, cost_ns(share->typical, bucket->rate.bytes));
	return 1 + (may - ahead) * share->weight / VIRTUAL / cost;
}

/* Say whether a queue waits for its group; the share is locked, and so is its group. */
static void wait_for_group(struct vt_share *share, struct vt_turn *turn, bool waits)
{
	if (turn->waiting == waits)
		return;
	turn->waiting = waits;
	share->waiting += waits ? 1u : -1u;
}

static uint32_t group_room(struct vt_share *share, struct vt_turn *turn, uint32_t most,
			   uint64_t now, uint64_t *wait)
{
	struct vt_group *group = share->group;
	uint64_t turns;
	uint32_t found;

	pthread_mutex_lock(&group->lock);
	if (!share->waiting)
		share->virtual_time = later(share->virtual_time, group->virtual_time);
	found = bucket_room(&group->bucket, share->typical, most, now, wait);
	if (found && (group->bucket.rate.requests || group->bucket.rate.bytes)) {
		turns = turn_room(group, share, now);
		if (turns < found)
			found = (uint32_t)turns;
		if (!found)
			*wait = later(*wait, SLICE_NS / 4);
	}
	/* One that could do more competes until it comes back. */
	wait_for_group(share, turn, found < most);
	share->due = now + *wait;
	pthread_mutex_unlock(&group->lock);
	return found;
}

/* A queue that waits for something else holds nobody up. The share is locked. */
static void leave_group(struct vt_share *share, struct vt_turn *turn)
{
	struct vt_group *group = share->group;

	if (!turn->waiting)
		return;
	if (group)
		pthread_mutex_lock(&group->lock);
	wait_for_group(share, turn, false);
	if (group)
		pthread_mutex_unlock(&group->lock);
}

uint32_t vt_share_ask(struct vt_share *share, struct vt_turn *turn, uint32_t waiting, uint64_t now,
		      uint64_t *wait_ns)
{
	uint32_t found;

	*wait_ns = 0;
	if (!__atomic_load_n(&share->limited, __ATOMIC_ACQUIRE))
		return waiting;
	pthread_mutex_lock(&share->lock);
	found = bucket_room(&share->bucket, share->typical, waiting, now, wait_ns);
	if (found && share->group)
		found = group_room(share, turn, found, now, wait_ns);
	else
		leave_group(share, turn);
	if (!found)
		__atomic_store_n(&share->waits, share->waits + 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&share->lock);
	return found;
}

void vt_share_took(struct vt_share *share, uint32_t requests, uint64_t bytes, uint64_t now)
{
	uint64_t cost, each;

	if (!requests || !__atomic_load_n(&share->limited, __ATOMIC_ACQUIRE))
		return;
	pthread_mutex_lock(&share->lock);
	each = bytes / requests;
	share->typical = later(each, share->typical - share->typical / 8);
	charge(&share->bucket, requests, bytes, now);
	if (share->group) {
		pthread_mutex_lock(&share->group->lock);
		cost = charge(&share->group->bucket, requests, bytes, now);
		share->virtual_time += cost * VIRTUAL / share->weight;
		pthread_mutex_unlock(&share->group->lock);
	}
	pthread_mutex_unlock(&share->lock);
}

void vt_share_leave(struct vt_share *share, struct vt_turn *turn)
{
	pthread_mutex_lock(&share->lock);
	leave_group(share, turn);
	pthread_mutex_unlock(&share->lock);
}
