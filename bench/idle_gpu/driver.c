/* libcuda.so.1 of a GPU that does nothing: the functions that Triton's driver.c calls. Launches are counted. */
#include <stddef.h>

typedef int Result;

static char context, functions[4096];
static long launches;

long idle_gpu_launches(void) { return launches; }

Result cuInit(unsigned flags) { return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "idle GPU"; return 0; }
Result cuDriverGetVersion(int *version) { *version = 12080; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }

/* Attributes of an H200 that Triton asks for, by the numbers of CUdevice_attribute. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 49152; break;    /* shared memory of a block */
    case 97: *value = 232448; break;  /* the same, opted in */
    case 10: *value = 32; break;      /* warp size */
    case 12: *value = 65536; break;   /* registers of a block */
    case 13: *value = 1980000; break; /* kHz */
    case 16: *value = 132; break;     /* multiprocessors */
    case 36: *value = 3201000; break; /* kHz of the memory */
    case 37: *value = 6144; break;    /* bits of its bus */
    case 75: *value = 9; break;       /* compute capability */
    case 76: *value = 0; break;
    default: *value = 1;
  }
  return 0;
}

Result cuCtxGetCurrent(void **current) { *current = &context; return 0; }
Result cuCtxSetCurrent(void *current) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuCtxSynchronize(void) { return 0; }
Result cuDevicePrimaryCtxRetain(void **current, int device) { *current = &context; return 0; }
Result cuDevicePrimaryCtxRelease(int device) { return 0; }
Result cuMemGetInfo(size_t *free, size_t *total) { *free = *total = (size_t)1 << 36; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = &context; return 0; }
Result cuModuleUnload(void *module) { return 0; }

Result cuModuleGetFunction(void **function, void *module, const char *name) {
  static int next;
  *function = &functions[next++ % sizeof functions];
  return 0;
}

Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuStreamGetCaptureInfo(void *stream, int *status, void *id) { *status = 0; return 0; }
Result cuTensorMapEncodeTiled(void *map, ...) { return 0; }
Result cuTensorMapEncodeIm2col(void *map, ...) { return 0; }
Result cuOccupancyMaxActiveClusters(int *number, void *function, void *config) { *number = 1; return 0; }

Result cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  *(unsigned long long *)data = pointer;
  return 0;
}

Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  launches++;
  return 0;
}
