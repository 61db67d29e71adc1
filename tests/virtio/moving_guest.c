/* The only program of a guest that is moved between two QEMUs: it writes and reads a disk, and knows
 * what each block and each page of its memory has to hold.
 *
 * As /init of an initramfs it loads /modules/0, 1, ... and runs writers that are processes of their
 * own, each on blocks of its own. A block holds its writer, its place and the turn in which it was
 * written. What was read stays in memory and is checked much later, just before its page is used
 * again: a page that the device wrote and that was not carried along shows then. A `q` on the serial
 * line ends it: everything is checked once more, and "good" or "bad" is its last word.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WRITERS 8
#define BLOCK 4096
#define BLOCKS 64  /* of each writer, on the disk */
#define PAGES 64   /* of each writer, that hold what was read */

struct shared {
	volatile int ending;
	volatile uint64_t turns[WRITERS];
};

struct block {
	uint64_t writer, place, turn, filled[BLOCK / 8 - 3];
};

static struct shared *shared;
static int console;

static void say(const char *text)
{
	if (write(console, text, strlen(text)) < 0)
		return;
}

static void load_modules(void)
{
	char path[32];

	for (int number = 0;; number++) {
		struct stat status;
		void *image;
		int fd;

		snprintf(path, sizeof(path), "/modules/%d", number);
		fd = open(path, O_RDONLY);
		if (fd < 0 || fstat(fd, &status))
			return;
		image = malloc((size_t)status.st_size);
		if (read(fd, image, (size_t)status.st_size) != status.st_size ||
		    syscall(SYS_init_module, image, status.st_size, ""))
			say("bad: a module cannot be loaded\n");
		free(image);
		close(fd);
	}
}

static uint64_t filling(uint64_t writer, uint64_t place, uint64_t turn, uint64_t at)
{
	return (turn * 64 + place) * 0x9E3779B97F4A7C15u + writer * 977 + at;
}

static void fill(struct block *block, uint64_t writer, uint64_t place, uint64_t turn)
{
	*block = (struct block){ .writer = writer, .place = place, .turn = turn };
	for (uint64_t at = 0; at < BLOCK / 8 - 3; at++)
		block->filled[at] = filling(writer, place, turn, at);
}

/* Return: whether a block is the one that was written there in that turn (0: never). */
static int check(const struct block *block, uint64_t writer, uint64_t place, uint64_t turn,
		 const char *where)
{
	struct block wanted;
	char text[160];

	if (turn)
		fill(&wanted, writer, place, turn);
	else
		memset(&wanted, 0, sizeof(wanted));
	if (!memcmp(block, &wanted, sizeof(wanted)))
		return 1;
	snprintf(text, sizeof(text),
		 "bad: %s, writer %lu place %lu turn %lu: holds writer %lu place %lu turn %lu\n", where,
		 writer, place, turn, block->writer, block->place, block->turn);
	say(text);
	return 0;
}

static int run_writer(uint64_t writer)
{
	static uint64_t written[BLOCKS], read_place[PAGES], read_turn[PAGES];
	static uint8_t is_read[PAGES];
	off_t first = (off_t)(writer * BLOCKS * BLOCK);
	struct block *pages = mmap(NULL, (PAGES + 1) * BLOCK, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	int disk = open("/dev/vda", O_RDWR | O_DIRECT), good = 1;
	uint64_t turn = 0, random = writer + 1;

	while (good && !shared->ending) {
		uint64_t page = turn % PAGES, place;

		random = random * 6364136223846793005u + 1442695040888963407u;
		place = random >> 33 & (BLOCKS - 1);
		turn++;
		fill(&pages[PAGES], writer, place, turn);
		if (pwrite(disk, &pages[PAGES], BLOCK, first + (off_t)place * BLOCK) != BLOCK)
			good = 0, say("bad: a write failed\n");
		written[place] = turn;
		if (is_read[page])
			good &= check(&pages[page], writer, read_place[page], read_turn[page],
				      "memory");
		place = random >> 40 & (BLOCKS - 1);
		if (pread(disk, &pages[page], BLOCK, first + (off_t)place * BLOCK) != BLOCK)
			good = 0, say("bad: a read failed\n");
		read_place[page] = place;
		read_turn[page] = written[place];
		is_read[page] = 1;
		shared->turns[writer] = turn;
	}
	for (uint64_t page = 0; page < PAGES; page++)
		if (is_read[page])
			good &= check(&pages[page], writer, read_place[page], read_turn[page],
				      "memory at the end");
	for (uint64_t place = 0; place < BLOCKS; place++) {
		if (pread(disk, pages, BLOCK, first + (off_t)place * BLOCK) != BLOCK)
			good = 0, say("bad: a read failed\n");
		good &= check(pages, writer, place, written[place], "the disk at the end");
	}
	return good ? 0 : 1;
}

static void tell_progress(void)
{
	char text[64];
	uint64_t turns = 0;

	for (int writer = 0; writer < WRITERS; writer++)
		turns += shared->turns[writer];
	snprintf(text, sizeof(text), "turns %lu\n", turns);
	say(text);
}

static void tick(void)
{
	struct timespec moment = { .tv_nsec = 100000000 };

	nanosleep(&moment, NULL);
}

int main(void)
{
	int good = 1, status;
	char asked;

	mount("dev", "/dev", "devtmpfs", 0, "");
	console = open("/dev/ttyS0", O_RDWR | O_NONBLOCK | O_NOCTTY);
	load_modules();
	for (int i = 0; i < 600 && access("/dev/vda", F_OK); i++)
		tick();
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	for (uint64_t writer = 0; writer < WRITERS; writer++)
		if (fork() == 0)
			_exit(run_writer(writer));
	while (read(console, &asked, 1) != 1 || asked != 'q') {
		tell_progress();
		tick();
	}
	shared->ending = 1;
	for (int i = 0; i < WRITERS; i++) {
		wait(&status);
		good &= status == 0;
	}
	say(good ? "good\n" : "bad: at the end\n");
	/* It stays until it is ended from outside. */
	for (;;)
		tick();
}
