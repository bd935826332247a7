/* A stand-in for NVIDIA's driver: what a host can do wrong, without a GPU.

   Device memory is the host's, which a page costs only once it is written.
   Copies are carried out. Launches are checked and counted, and not run.
   While a stream is recorded as a graph, what a driver then forbids is
   refused with its codes, and spoils the recording, as it does there.

   long standin(const char *name)  how often: see NAMES; -1 for another name
   const char *standin_refused()   the first thing refused; "" if none was
   void standin_reset()            all counts begin again at 0

   STANDIN_GENERATION=80 stands for an A100; 90, an H100, is the default.
   STANDIN_GPUS=0 is a driver that finds no GPU.                            */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK, BAD_VALUE, NO_MEMORY, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
enum { FORBIDDEN = 900, SPOILT = 901, IMPLICIT = 906 };

#define NAMES(X)                                                            \
  X(allocations) X(bytes) X(frees) X(copies) X(waits) X(launches)           \
  X(recorded) X(recorded_copies) X(recordings) X(replays) X(replayed)       \
  X(refusals) X(loads) X(destroyed)
#define FIELD(name) long name;
static struct { NAMES(FIELD) } counts;
static char first_refusal[256];

static void *recording; /* the stream that is recorded, or NULL */
static int spoilt;
static long length; /* launches in the graph that was recorded last */
static char objects[1 << 16]; /* their addresses serve as handles */
static int used = 8;

static void *handle(void) { return &objects[used++ % sizeof objects]; }

static int setting(const char *name, int otherwise) {
  const char *said = getenv(name);
  return said ? atoi(said) : otherwise;
}

/* counts, for the tests */
long standin(const char *name) {
#define ASKED(field) if (!strcmp(name, #field)) return counts.field;
  NAMES(ASKED)
  return -1;
}

const char *standin_refused(void) { return first_refusal; }

void standin_reset(void) {
  memset(&counts, 0, sizeof counts);
  first_refusal[0] = 0;
}

/* refusals */
static int refuse(int code, const char *what) {
  if (!counts.refusals++)
    snprintf(first_refusal, sizeof first_refusal, "%s (%d)", what, code);
  return code;
}

static int forbid(const char *what) {
  spoilt = 1;
  return refuse(FORBIDDEN, what);
}

#define NOT_WHILE_RECORDING if (recording) return forbid(__func__)

/* the device */
int cuInit(unsigned flags) { return OK; }

int cuDriverGetVersion(int *version) { return *version = 13000, OK; }

int cuDeviceGetCount(int *count) {
  return *count = setting("STANDIN_GPUS", 1), OK;
}

int cuDeviceGet(int *device, int number) { return *device = number, OK; }

int cuDeviceGetName(char *name, int size, int device) {
  return snprintf(name, size, "a stand-in, no GPU"), OK;
}

int cuDeviceGetUuid_v2(char *uuid, int device) {
  return memset(uuid, 1, 16), OK;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  return *bytes = 80ull << 30, OK;
}

int cuMemGetInfo_v2(size_t *left, size_t *bytes) {
  return *left = *bytes = 80ull << 30, OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int generation = setting("STANDIN_GENERATION", 90);
  static const int known[][2] = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},      /* threads of a block */
      {5, 2147483647}, {6, 65535}, {7, 65535},       /* blocks of a grid */
      {8, 49152}, {9, 65536}, {10, 32}, {12, 65536}, /* shared, constant */
      {13, 1980000}, {16, 132}, {36, 2619000},       /* clocks, processors */
      {37, 5120}, {38, 52428800}, {39, 2048}, {41, 1}, {81, 233472},
      {82, 65536}, {95, 1}, {97, 232448}, {115, 1},
  };
  *value = attribute == 75   ? generation / 10
           : attribute == 76 ? generation % 10
                             : 0;
  for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i][0] == attribute) *value = known[i][1];
  return OK;
}

/* one context, always the same */
static void *current;

int cuDevicePrimaryCtxRetain(void **context, int device) {
  return *context = objects, OK;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, OK;
}

int cuCtxGetCurrent(void **context) { return *context = current, OK; }
int cuCtxSetCurrent(void *context) { return current = context, OK; }
int cuCtxPushCurrent_v2(void *context) { return current = context, OK; }
int cuCtxPopCurrent_v2(void **context) { return *context = current, OK; }
int cuCtxGetDevice(int *device) { return *device = 0, OK; }
int cuCtxGetId(void *context, uint64_t *id) { return *id = 1, OK; }

int cuCtxGetApiVersion(void *context, unsigned *version) {
  return *version = 13000, OK;
}

int cuCtxGetLimit(size_t *value, int limit) { return *value = 1024, OK; }

int cuCtxGetStreamPriorityRange(int *least, int *most) {
  return *least = 0, *most = -5, OK;
}

int cuCtxSynchronize(void) {
  NOT_WHILE_RECORDING;
  return counts.waits++, OK;
}

/* memory */
int cuMemAlloc_v2(uint64_t *place, size_t bytes) {
  NOT_WHILE_RECORDING;
  if (bytes > 80ull << 30) return NO_MEMORY;
  int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *block = mmap(0, bytes, PROT_READ | PROT_WRITE, how, -1, 0);
  if (block == MAP_FAILED) return NO_MEMORY;
  counts.allocations++, counts.bytes += bytes;
  return *place = (uint64_t)block, OK;
}

int cuMemAllocAsync(uint64_t *place, size_t bytes, void *stream) {
  return cuMemAlloc_v2(place, bytes);
}

int cuMemFree_v2(uint64_t place) {
  NOT_WHILE_RECORDING;
  return counts.frees++, OK;
}

int cuMemFreeAsync(uint64_t place, void *stream) {
  return cuMemFree_v2(place);
}

static int copy(void *there, const void *here, size_t bytes) {
  memcpy(there, here, bytes);
  return counts.copies++, OK;
}

int cuMemcpyHtoD_v2(uint64_t there, const void *here, size_t bytes) {
  NOT_WHILE_RECORDING;
  return copy((void *)there, here, bytes);
}

int cuMemcpyDtoH_v2(void *there, uint64_t here, size_t bytes) {
  NOT_WHILE_RECORDING;
  return copy(there, (void *)here, bytes);
}

int cuMemcpyDtoD_v2(uint64_t there, uint64_t here, size_t bytes) {
  NOT_WHILE_RECORDING;
  return copy((void *)there, (void *)here, bytes);
}

/* a copy in a recorded stream is allowed, and becomes part of the graph */
static int queued(void *there, const void *here, size_t bytes, void *stream) {
  if (!recording || stream != recording) return copy(there, here, bytes);
  return counts.recorded_copies++, OK;
}

int cuMemcpyHtoDAsync_v2(uint64_t a, const void *b, size_t n, void *stream) {
  return queued((void *)a, b, n, stream);
}

int cuMemcpyDtoHAsync_v2(void *a, uint64_t b, size_t n, void *stream) {
  return queued(a, (void *)b, n, stream);
}

int cuMemcpyDtoDAsync_v2(uint64_t a, uint64_t b, size_t n, void *stream) {
  return queued((void *)a, (void *)b, n, stream);
}

int cuMemsetD8_v2(uint64_t place, unsigned char value, size_t bytes) {
  NOT_WHILE_RECORDING;
  return memset((void *)place, value, bytes), counts.copies++, OK;
}

int cuPointerGetAttribute(void *value, int attribute, uint64_t place) {
  *(uint64_t *)value = attribute == 3 || attribute == 7 ? place : 0;
  return OK;
}

int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t place) {
  if (base) *base = place;
  if (bytes) *bytes = 1;
  return OK;
}

/* streams */
int cuStreamCreate(void **stream, unsigned flags) {
  return *stream = handle(), OK;
}

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  return *stream = handle(), OK;
}

int cuStreamSynchronize(void *stream) {
  if (recording && (!stream || stream == recording)) return forbid(__func__);
  return counts.waits++, OK;
}

int cuStreamGetCtx(void *stream, void **context) {
  return *context = objects, OK;
}

int cuStreamGetFlags(void *stream, unsigned *flags) { return *flags = 0, OK; }
int cuStreamGetDevice(void *stream, int *device) { return *device = 0, OK; }

int cuStreamGetPriority(void *stream, int *value) { return *value = 0, OK; }

int cuStreamGetId(void *stream, uint64_t *id) {
  return *id = (uint64_t)stream, OK;
}

/* graphs: one at a time is recorded */
int cuStreamBeginCapture_v2(void *stream, int mode) {
  if ((uint64_t)stream < 3) return refuse(FORBIDDEN, "the default stream");
  NOT_WHILE_RECORDING;
  return recording = stream, spoilt = 0, length = 0, OK;
}

int cuStreamEndCapture(void *stream, void **graph) {
  if (!recording || stream != recording)
    return refuse(BAD_VALUE, "the end of what was not begun");
  recording = NULL;
  *graph = spoilt ? NULL : handle();
  return spoilt ? SPOILT : (counts.recordings++, OK);
}

int cuStreamIsCapturing(void *stream, int *state) {
  return *state = recording && stream == recording, OK;
}

int cuGraphInstantiateWithFlags(void **made, void *graph, uint64_t flags) {
  if (!graph) return refuse(BAD_VALUE, "a graph of nothing");
  return *made = handle(), OK;
}

int cuGraphDestroy(void *graph) { return counts.destroyed++, OK; }

int cuGraphLaunch(void *made, void *stream) {
  NOT_WHILE_RECORDING;
  counts.replayed += length;
  return counts.replays++, OK;
}

/* events: each is a millisecond after the last */
static long clock_ms;

int cuEventCreate(void **event, unsigned flags) {
  return *event = calloc(1, sizeof(long)), OK;
}

int cuEventRecord(long *event, void *stream) {
  return *event = ++clock_ms, OK;
}

int cuEventSynchronize(void *event) {
  NOT_WHILE_RECORDING;
  return counts.waits++, OK;
}

int cuEventElapsedTime_v2(float *ms, long *begin, long *end) {
  return *ms = *end - *begin, OK;
}

/* code: only its name is kept */
static int named(void **made, const char *name) {
  return *made = strdup(name), OK;
}

int cuLibraryLoadData(void **library, const void *code) {
  NOT_WHILE_RECORDING;
  return counts.loads++, *library = handle(), OK;
}

int cuModuleLoadDataEx(void **module, const void *code) {
  NOT_WHILE_RECORDING;
  return counts.loads++, *module = handle(), OK;
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  return named(kernel, name);
}

int cuModuleGetFunction(void **made, void *module, const char *name) {
  return named(made, name);
}

int cuLibraryGetModule(void **module, void *library) {
  return *module = library, OK;
}

int cuKernelGetFunction(void **made, void *kernel) {
  return *made = kernel, OK;
}

int cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  return *value = 0, OK;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = 0, OK;
}

int cuKernelGetName(const char **name, void *kernel) {
  return *name = kernel, OK;
}

int cuKernelGetLibrary(void **library, void *kernel) {
  return *library = objects, OK;
}

int cuKernelGetParamInfo(void *kernel, size_t i, size_t *at, size_t *size) {
  return BAD_VALUE;
}

/* launches */
int cuLaunchKernel(const char *name, unsigned x, unsigned y, unsigned z,
                   unsigned a, unsigned b, unsigned c, unsigned shared,
                   void *stream, void **arguments, void **more) {
  char what[200];
  snprintf(what, sizeof what, "%.120s: grid %u %u %u, block %u %u %u", name,
           x, y, z, a, b, c);
  if (!x || !y || !z || x > 2147483647u || y > 65535 || z > 65535)
    return refuse(BAD_VALUE, what);
  if (!a || !b || !c || (uint64_t)a * b * c > 1024 || shared > 49152)
    return refuse(BAD_VALUE, what);
  if (recording && stream != recording) {
    spoilt = 1;
    return refuse(IMPLICIT, what);
  }
  if (recording) return length++, counts.recorded++, OK;
  return counts.launches++, OK;
}

struct launch {
  unsigned x, y, z, a, b, c, shared;
  void *stream, *attributes;
  unsigned count;
};

int cuLaunchKernelEx(struct launch *l, const char *name, void **arguments,
                     void **more) {
  return cuLaunchKernel(name, l->x, l->y, l->z, l->a, l->b, l->c, l->shared,
                        l->stream, arguments, more);
}

/* errors */
int cuGetErrorName(int code, const char **said) {
  static char name[32];
  snprintf(name, sizeof name, "CUDA_ERROR_%d", code);
  return *said = name, OK;
}

int cuGetErrorString(int code, const char **said) {
  return cuGetErrorName(code, said);
}

/* what is done by doing nothing */
#define NOTHING(name) int name(void) { return OK; }
NOTHING(cuDevicePrimaryCtxRelease_v2)
NOTHING(cuDevicePrimaryCtxReset_v2)
NOTHING(cuDevicePrimaryCtxSetFlags_v2)
NOTHING(cuStreamDestroy_v2)
NOTHING(cuStreamQuery)
NOTHING(cuStreamWaitEvent)
NOTHING(cuThreadExchangeStreamCaptureMode)
NOTHING(cuGraphExecDestroy)
NOTHING(cuEventDestroy_v2)
NOTHING(cuEventQuery)
NOTHING(cuLibraryUnload)
NOTHING(cuModuleUnload)
NOTHING(cuKernelSetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  return *blocks = 2, OK;
}

int cuDeviceCanAccessPeer(int *can) { return *can = 0, OK; }

/* how libraries find the functions: each of ours exists in one version */
int cuGetProcAddress_v2(const char *name, void **found, int version,
                        uint64_t flags, int *status) {
  static void *self;
  Dl_info info;
  char second[128];
  if (!self && dladdr((void *)cuGetProcAddress_v2, &info))
    self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  snprintf(second, sizeof second, "%s_v2", name);
  *found = dlsym(self, second);
  if (!*found) *found = dlsym(self, name);
  if (status) *status = !*found;
  return *found ? OK : NOT_FOUND;
}
