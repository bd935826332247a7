/* A stand-in for NCCL: what ranks can ask of each other that does not fit.

   It moves bytes between processes, or threads, of one machine, through a
   file in shared memory, in host's memory: a simulated GPU's arrays are
   there, and so are those of the stand-in for the driver. A call within a
   group is kept until the group ends; then all of them are carried out.
   Sends and receives must meet another of the same length and type, and be
   within a group: NCCL would hang, or do harm, where this refuses.

   While the stream of a call is recorded as a graph, calls are counted and
   not carried out.

   long standin_nccl(const char *name)  how often: see NAMES; -1 if unknown
   const char *standin_nccl_refused()   the first thing refused; "" if none
   void standin_nccl_reset()            all counts begin again at 0

   STANDIN_PATIENCE: seconds after which a group stands still; 20 else.     */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { OK, SYSTEM = 2, INTERNAL = 3, BAD_ARGUMENT = 4, BAD_USE = 5 };
enum { MOST = 16, ROOM = 1 << 16, CALLS = 1024 };
enum { SEND, RECV };

#define NAMES(X)                                                            \
  X(sends) X(receives) X(broadcasts) X(groups) X(bytes) X(recorded)         \
  X(refusals)
#define FIELD(name) atomic_long name;
static struct { NAMES(FIELD) } counts;
static char first_refusal[256];

long standin_nccl(const char *name) {
#define ASKED(field) if (!strcmp(name, #field)) return counts.field;
  NAMES(ASKED)
  return -1;
}

const char *standin_nccl_refused(void) { return first_refusal; }

void standin_nccl_reset(void) {
  memset(&counts, 0, sizeof counts);
  first_refusal[0] = 0;
}

static int note(atomic_long *count) {
  ++*count;
  return OK;
}

static int refuse(int code, const char *what) {
  if (!counts.refusals++)
    snprintf(first_refusal, sizeof first_refusal, "%s", what);
  return code;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static double patience(void) {
  const char *said = getenv("STANDIN_PATIENCE");
  return said ? atof(said) : 20;
}

static void rest(void) { usleep(50); }

/* what ranks share: a pipe from each to each */
struct pipe {
  atomic_ulong written, read;
  unsigned char bytes[ROOM];
};

struct shared {
  atomic_int here;
  struct pipe pipes[MOST][MOST];
};

struct key {
  char name[128];
};

struct comm {
  int rank, size, failed, alive;
  struct shared *shared;
  char name[128];
};

/* a call: head first, so that both ends can compare; then the numbers */
struct head {
  uint64_t count;
  int32_t type, kind;
};

struct call {
  int kind, peer, type, done;
  uint64_t count, at, length; /* bytes moved, of the head and the numbers */
  struct head head;
  unsigned char *place;
  struct comm *comm;
};

static _Thread_local struct call calls[CALLS];
static _Thread_local int depth, many;

static int width(int type) {
  static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type < 0 || type > 9 ? 0 : sizes[type];
}

/* move what can be moved now */
static int put(struct pipe *p, const void *from, int most) {
  unsigned long w = p->written, room = ROOM - (w - p->read);
  int n = most < (int)room ? most : (int)room;
  for (int done = 0; done < n;) {
    int at = (w + done) % ROOM, part = ROOM - at;
    if (part > n - done) part = n - done;
    memcpy(p->bytes + at, (const char *)from + done, part);
    done += part;
  }
  p->written = w + n;
  return n;
}

static int get(struct pipe *p, void *to, int most) {
  unsigned long r = p->read, there = p->written - r;
  int n = most < (int)there ? most : (int)there;
  for (int done = 0; done < n;) {
    int at = (r + done) % ROOM, part = ROOM - at;
    if (part > n - done) part = n - done;
    memcpy((char *)to + done, p->bytes + at, part);
    done += part;
  }
  p->read = r + n;
  return n;
}

static int step(struct call *c, int *moved) {
  struct comm *k = c->comm;
  int out = c->kind == SEND;
  uint64_t head = sizeof(struct head);
  struct pipe *p = out ? &k->shared->pipes[k->rank][c->peer]
                       : &k->shared->pipes[c->peer][k->rank];
  while (!c->done) {
    int in_head = c->at < head;
    unsigned char *place = in_head ? (unsigned char *)&c->head + c->at
                                   : c->place + (c->at - head);
    uint64_t left = (in_head ? head : head + c->length) - c->at;
    int most = left > ROOM ? ROOM : (int)left;
    int n = !most ? 0 : out ? put(p, place, most) : get(p, place, most);
    c->at += n, *moved |= n > 0;
    if (!out && in_head && c->at == head &&
        (c->head.count != c->count || c->head.type != c->type)) {
      char what[200];
      snprintf(what, sizeof what,
               "rank %d sends %lu numbers of type %d, rank %d expects %lu of "
               "type %d", c->peer, (unsigned long)c->head.count, c->head.type,
               k->rank, (unsigned long)c->count, c->type);
      return refuse(BAD_ARGUMENT, what);
    }
    c->done = c->at == head + c->length;
    if (!n && !c->done) return OK;
  }
  return OK;
}

static int carry_out(void) {
  double end = now() + patience();
  int code = OK, left = many;
  while (left && !code) {
    int moved = 0;
    left = 0;
    for (int i = 0; i < many && !code; i++) {
      struct call *c = &calls[i];
      int waits = 0; /* one pipe, one call at a time, in their order */
      for (int j = 0; j < i; j++)
        waits |= !calls[j].done && calls[j].comm == c->comm &&
                 calls[j].peer == c->peer && calls[j].kind == c->kind;
      if (!c->done && !waits) code = step(c, &moved);
      left += !c->done;
    }
    if (moved) end = now() + patience();
    else if (left) rest();
    if (left && now() > end)
      code = refuse(SYSTEM, "a group stands still: nobody answers a call");
  }
  for (int i = 0; code && i < many; i++) calls[i].comm->failed = code;
  return many = 0, code;
}

/* is the stream recorded: asked of whatever driver the process has */
static int is_recorded(void *stream) {
  static int (*asked)(void *, int *);
  static int looked;
  int state = 0;
  if (!looked++) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (driver) asked = dlsym(driver, "cuStreamIsCapturing");
  }
  return asked && !asked(stream, &state) && state;
}

static int add(int kind, void *place, uint64_t count, int type, int peer,
               struct comm *comm) {
  if (many == CALLS) return refuse(INTERNAL, "too many calls in a group");
  struct call *c = &calls[many++];
  *c = (struct call){.kind = kind, .peer = peer, .type = type, .count = count,
                     .length = count * width(type), .place = place,
                     .comm = comm, .head = {count, type, 0}};
  if (kind == SEND && peer != comm->rank) counts.bytes += c->length;
  return OK;
}

static int check(const char *name, struct comm *comm, const void *place,
                 uint64_t count, int type, int peer) {
  char what[200];
  const char *why = !comm || comm->alive != 77 ? "a communicator"
                    : !place && count          ? "an address"
                    : !width(type)             ? "a type"
                    : peer < 0 || peer >= comm->size ? "a rank"
                                                     : NULL;
  if (!why) return OK;
  snprintf(what, sizeof what, "%s: that is not %s", name, why);
  return refuse(BAD_ARGUMENT, what);
}

#define CHECKED(place, peer)                                                \
  int code = check(__func__, comm, place, count, type, peer);               \
  if (code) return code

#define IN_A_GROUP                                                          \
  if (!depth) return refuse(BAD_USE, "a call outside a group may wait for ever")

/* what a program calls */
int ncclGetVersion(int *version) { return *version = 23203, OK; }

const char *ncclGetErrorString(int code) {
  static const char *words[] = {
      "no error", "unhandled cuda error", "unhandled system error",
      "internal error", "invalid argument", "invalid usage"};
  return code < 0 || code > 5 ? "unknown" : words[code];
}

int ncclGetUniqueId(struct key *key) {
  static atomic_int drawn;
  memset(key, 0, sizeof *key);
  snprintf(key->name, sizeof key->name, "/standin_nccl_%d_%d_%ld",
           (int)getpid(), drawn++, (long)time(NULL));
  return OK;
}

int ncclCommInitRank(struct comm **made, int size, struct key key, int rank) {
  if (rank < 0 || rank >= size || size > MOST ||
      strncmp(key.name, "/standin_nccl_", 14))
    return refuse(BAD_ARGUMENT, "ncclCommInitRank: no such rank, or no key");
  struct comm *comm = calloc(1, sizeof *comm);
  int file = shm_open(key.name, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof *comm->shared)) return SYSTEM;
  comm->shared = mmap(0, sizeof *comm->shared, PROT_READ | PROT_WRITE,
                      MAP_SHARED, file, 0);
  close(file);
  if (comm->shared == MAP_FAILED) return SYSTEM;
  comm->rank = rank, comm->size = size, comm->alive = 77;
  memcpy(comm->name, key.name, sizeof comm->name);
  comm->shared->here++;
  double end = now() + patience();
  while (comm->shared->here < size) {
    if (now() > end) {
      shm_unlink(comm->name);
      return refuse(SYSTEM, "ncclCommInitRank: not all ranks have come");
    }
    rest();
  }
  if (!rank) shm_unlink(comm->name); /* all have it, and it goes with them */
  return *made = comm, OK;
}

int ncclCommGetAsyncError(struct comm *comm, int *code) {
  if (depth) *code = refuse(BAD_USE, "a group was not ended");
  else *code = comm->failed;
  return OK;
}

int ncclGroupStart(void) { return depth++, OK; }

int ncclGroupEnd(void) {
  if (!depth) return refuse(BAD_USE, "ncclGroupEnd: no group was started");
  if (--depth) return OK;
  counts.groups++;
  return carry_out();
}

int ncclSend(void *place, size_t count, int type, int peer, struct comm *comm,
             void *stream) {
  CHECKED(place, peer);
  IN_A_GROUP;
  counts.sends++;
  if (is_recorded(stream)) return note(&counts.recorded);
  return add(SEND, place, count, type, peer, comm);
}

int ncclRecv(void *place, size_t count, int type, int peer, struct comm *comm,
             void *stream) {
  CHECKED(place, peer);
  IN_A_GROUP;
  counts.receives++;
  if (is_recorded(stream)) return note(&counts.recorded);
  return add(RECV, place, count, type, peer, comm);
}

int ncclBroadcast(void *from, void *to, size_t count, int type, int root,
                  struct comm *comm, void *stream) {
  CHECKED(to, root);
  IN_A_GROUP;
  counts.broadcasts++;
  if (is_recorded(stream)) return note(&counts.recorded);
  if (comm->rank != root) return add(RECV, to, count, type, root, comm);
  if (from != to) memcpy(to, from, count * width(type));
  for (int i = 0; i < comm->size && !code; i++)
    if (i != root) code = add(SEND, from, count, type, i, comm);
  return code;
}
