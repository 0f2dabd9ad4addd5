/* A CUDA driver library without a GPU: it accepts whatever Triton asks of it, and tells who listens what is launched. */

#include <stdint.h>
#include <string.h>

enum { MAJOR = 75, MINOR = 76, THREADS = 0 };

void (*heard)(const char *name, unsigned programs, const uint64_t *const *arguments);

static int told(void *kernel, unsigned programs, void **arguments) {
  if (heard) heard(kernel, programs, (const uint64_t *const *)arguments);
  return 0;
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == MAJOR ? 9 : attribute == MINOR ? 0 : 232448;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "there is no GPU"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **kernel, void *module, const char *name) { *kernel = strdup(name); return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *kernel) { *value = attribute == THREADS ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *kernel, int config) { return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuPointerGetAttributes(unsigned count, int *attributes, void **values, uint64_t pointer) {
  for (unsigned i = 0; i < count; i++) *(uint64_t *)values[i] = pointer;
  return 0;
}
int cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *kernel, void *config) { *count = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuLaunchKernelEx(const unsigned *config, void *kernel, void **arguments, void **extra) {
  return told(kernel, config[0], arguments);
}
int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra) {
  return told(kernel, x, arguments);
}
