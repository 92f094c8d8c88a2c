/* A libcuda on which every call succeeds at once and nothing runs: what is left of a step is its time on the host.

   Triton loads binaries into it, asks for limits, and launches. Every function answers as much as it is asked for. */

#define ANSWERS_NOTHING(name) int name() { return 0; }

ANSWERS_NOTHING(cuCtxGetLimit)
ANSWERS_NOTHING(cuCtxSetCurrent)
ANSWERS_NOTHING(cuCtxSetLimit)
ANSWERS_NOTHING(cuFuncSetAttribute)
ANSWERS_NOTHING(cuFuncSetCacheConfig)
ANSWERS_NOTHING(cuLaunchKernel)
ANSWERS_NOTHING(cuLaunchKernelEx)
ANSWERS_NOTHING(cuModuleUnload)
ANSWERS_NOTHING(cuOccupancyMaxActiveClusters)
ANSWERS_NOTHING(cuPointerGetAttributes)
ANSWERS_NOTHING(cuStreamIsCapturing)
ANSWERS_NOTHING(cuTensorMapEncodeIm2col)
ANSWERS_NOTHING(cuTensorMapEncodeTiled)

/* Not found, so that nobody goes past this library. */
int cuGetProcAddress() { return 1; }

int cuCtxGetCurrent(void **context) { *context = (void *)64; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)64; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "a stub has no errors"; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)32; return 0; }
int cuModuleLoadData(void **module, const void *data) { *module = (void *)16; return 0; }
/* An address is its own on the device. */
int cuPointerGetAttribute(unsigned long long *value, int attribute, unsigned long long address) { *value = address; return 0; }
/* 227 KiB, the most shared memory of any limit that is looked at; as many threads as any kernel takes. */
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
