/* fake_cusparselt.c: a cuSPARSELt for tests, on host memory, bfloat16, and int8 to bfloat16; built by
 * test_cusparselt.py with cc -DMINOR=8 -DPATCH=1 -DOBJECT_BYTES=512.
 *
 * It computes what the real library computes (the blob is values and 4-bit patterns, 9/16 of the
 * dense bytes), refuses what that refuses, fills its structures to the size that its version
 * declares, notices structures that moved or were destroyed too early, and counts.
 *
 * Algorithms   0  right and slow; splits K in one kernel, with a workspace
 *              1  right and fast
 *              2  fastest; the last row of y is wrong
 *              3  not supported
 *              4  fast; right for the first five runs of a plan, then wrong
 *              5  fast; forgets the bias and the factors of the rows
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, INVALID_VALUE = 3, INTERNAL_ERROR = 7, TYPE_NOT_SUPPORTED = 8, NOT_SUPPORTED = 10 };
enum { ALGORITHMS = 6, WORKSPACE = 64, BUFFER = 16, BFLOAT16 = 14, INT8 = 3 };

/* What the tests read: calls, and objects that are alive. */
int fake_inits, fake_handles, fake_matrices, fake_selections, fake_plans_built, fake_plans;
int fake_matmuls, fake_fail_next_matmul;

typedef struct {
  void* self; /* its own address while it is initialised: notices moves and early destruction */
  int64_t rows, columns, stride;
  int type, order, structured;
} Matrix;
typedef struct { void* self; } Handle;
typedef struct {
  void* self;
  const Matrix *a, *b, *d;
  int transpose_b, relu, alpha_vector;
  const uint16_t* bias;
} Matmul;
typedef struct {
  void* self;
  int id, split_k, mode;
} Selection;
typedef struct {
  void* self;
  const Matmul* matmul;
  Selection selection;
  int runs;
} Plan;

static void* start(void* object) {
  memset(object, 0x5A, OBJECT_BYTES);
  *(void**)object = object;
  return object;
}

static int alive(const void* object) { return *(void* const*)object == object; }

static int stop(const void* object, int* count) {
  if (!alive(object)) return INTERNAL_ERROR;
  --*count;
  *(void**)object = 0;
  return OK;
}

int cusparseLtGetProperty(int which, int* value) {
  *value = which == 0 ? 0 : which == 1 ? MINOR : PATCH;
  return OK;
}

int cusparseLtInit(void* handle) {
  start(handle);
  ++fake_inits;
  ++fake_handles;
  return OK;
}

int cusparseLtDestroy(const void* handle) { return stop(handle, &fake_handles); }

static int describe(const void* handle, Matrix* matrix, int64_t rows, int64_t columns,
                    int64_t stride, uint32_t alignment, int type, int order, int structured) {
  const int multiple = (structured ? 16 : 8) * (type == INT8 ? 2 : 1);
  if (!alive(handle)) return INTERNAL_ERROR;
  if (type != BFLOAT16 && type != INT8) return TYPE_NOT_SUPPORTED;
  if (rows % multiple || columns % multiple || stride % multiple || alignment != 16)
    return NOT_SUPPORTED;
  if (stride < (order == 1 ? rows : columns)) return INVALID_VALUE;
  start(matrix);
  matrix->rows = rows;
  matrix->columns = columns;
  matrix->stride = stride;
  matrix->type = type;
  matrix->order = order;
  matrix->structured = structured;
  ++fake_matrices;
  return OK;
}

int cusparseLtDenseDescriptorInit(const void* handle, void* matrix, int64_t rows, int64_t columns,
                                  int64_t stride, uint32_t alignment, int type, int order) {
  return describe(handle, matrix, rows, columns, stride, alignment, type, order, 0);
}

int cusparseLtStructuredDescriptorInit(const void* handle, void* matrix, int64_t rows,
                                       int64_t columns, int64_t stride, uint32_t alignment,
                                       int type, int order, int sparsity) {
  if (sparsity != 0) return INVALID_VALUE;
  return describe(handle, matrix, rows, columns, stride, alignment, type, order, 1);
}

int cusparseLtMatDescriptorDestroy(const void* matrix) { return stop(matrix, &fake_matrices); }

int cusparseLtMatmulDescriptorInit(const void* handle, void* matmul, int operation_a,
                                   int operation_b, const void* a, const void* b, const void* c,
                                   const void* d, int compute_type) {
  Matmul* m = matmul;
  const Matrix *ma = a, *mb = b, *md = d;
  if (!alive(handle) || !alive(a) || !alive(b) || !alive(c) || !alive(d)) return INTERNAL_ERROR;
  if (ma->type != mb->type || md->type != BFLOAT16) return NOT_SUPPORTED;
  if (compute_type != (ma->type == INT8 ? 0 : 2) || operation_a != 0 || !ma->structured || mb->structured)
    return INVALID_VALUE;
  start(m);
  m->a = ma;
  m->b = mb;
  m->d = md;
  m->transpose_b = operation_b;
  m->relu = m->alpha_vector = 0;
  m->bias = 0;
  return OK;
}

int cusparseLtMatmulDescSetAttribute(const void* handle, void* matmul, int attribute,
                                     const void* data, size_t bytes) {
  Matmul* m = matmul;
  if (!alive(handle) || !alive(m)) return INTERNAL_ERROR;
  if (attribute == 0 && bytes == sizeof(int)) {
    m->relu = *(const int*)data;
  } else if (attribute == 5 && bytes == sizeof(int)) {
    m->alpha_vector = *(const int*)data;
  } else if (attribute == 8 && bytes == sizeof(void*)) {
    m->bias = *(const uint16_t* const*)data;
  } else {
    return INVALID_VALUE;
  }
  return OK;
}

int cusparseLtMatmulAlgSelectionInit(const void* handle, void* selection, const void* matmul,
                                     int algorithm) {
  Selection* s = selection;
  if (!alive(handle) || !alive(matmul) || algorithm != 0) return INTERNAL_ERROR;
  start(s);
  s->id = 0;
  s->split_k = 1;
  s->mode = 0;
#if MINOR >= 8
  ++fake_selections;
#endif
  return OK;
}

#if MINOR >= 8
int cusparseLtMatmulAlgSelectionDestroy(const void* selection) {
  return stop(selection, &fake_selections);
}
#endif

int cusparseLtMatmulAlgSetAttribute(const void* handle, void* selection, int attribute,
                                    const void* data, size_t bytes) {
  Selection* s = selection;
  const int value = *(const int*)data;
  if (!alive(handle) || !alive(s)) return INTERNAL_ERROR;
  if (bytes != sizeof(int)) return INVALID_VALUE;
  if (attribute == 0 && value >= 0 && value < ALGORITHMS) {
    s->id = value;
  } else if (attribute == 3) {
    s->split_k = value;
  } else if (attribute == 4) {
    s->mode = value;
  } else {
    return INVALID_VALUE;
  }
  return OK;
}

int cusparseLtMatmulAlgGetAttribute(const void* handle, const void* selection, int attribute,
                                    void* data, size_t bytes) {
  if (!alive(handle) || !alive(selection)) return INTERNAL_ERROR;
  if (attribute != 1 || bytes != sizeof(int)) return INVALID_VALUE;
  *(int*)data = ALGORITHMS;
  return OK;
}

int cusparseLtMatmulPlanInit(const void* handle, void* plan, const void* matmul,
                             const void* selection) {
  Plan* p = plan;
  const Selection* s = selection;
  if (!alive(handle) || !alive(matmul) || !alive(selection)) return INTERNAL_ERROR;
  if (s->id == 3 || (s->split_k != 1 && (s->id != 0 || s->mode != 1))) return NOT_SUPPORTED;
  start(p);
  p->matmul = matmul;
  p->selection = *s;
  p->runs = 0;
  ++fake_plans_built;
  ++fake_plans;
  return OK;
}

int cusparseLtMatmulPlanDestroy(const void* plan) {
  if (!alive(((const Plan*)plan)->matmul)) return INTERNAL_ERROR;
  return stop(plan, &fake_plans);
}

int cusparseLtMatmulGetWorkspace(const void* handle, const void* plan, size_t* bytes) {
  if (!alive(handle) || !alive(plan)) return INTERNAL_ERROR;
  *bytes = ((const Plan*)plan)->selection.split_k > 1 ? WORKSPACE : 0;
  return OK;
}

/* The blob: values [rows, columns / 2], then one byte per group of 4, its two columns. */
int cusparseLtSpMMACompressedSize2(const void* handle, const void* matrix, size_t* blob,
                                   size_t* buffer) {
  const Matrix* m = matrix;
  if (!alive(handle) || !alive(m)) return INTERNAL_ERROR;
  *blob = (size_t)(m->rows * m->columns / (m->type == INT8 ? 2 : 1) + m->rows * m->columns / 8);
  *buffer = BUFFER;
  return OK;
}

int cusparseLtSpMMACompress2(const void* handle, const void* matrix, int is_sparse_a,
                             int operation, const void* dense, void* blob, void* buffer,
                             void* stream) {
  const Matrix* m = matrix;
  const int size = m->type == INT8 ? 1 : 2;
  const uint8_t* w = dense;
  uint8_t* values = blob;
  uint8_t* patterns = values + m->rows * m->columns / 2 * size;
  (void)stream;
  if (!alive(handle) || !alive(m) || is_sparse_a != 1 || operation != 0) return INTERNAL_ERROR;
  memset(buffer, 0, BUFFER);
  memset(patterns, 0, (size_t)(m->rows * m->columns / 8));
  for (int64_t group = 0; group < m->rows * m->columns / 4; ++group) {
    int kept[2] = {2, 3}, count = 0;
    for (int column = 0; column < 4; ++column)
      if (w[(4 * group + column) * size] || w[(4 * group + column) * size + size - 1]) {
        if (count == 2) return INVALID_VALUE;
        kept[count++] = column;
      }
    if (count == 1) kept[1] = kept[0] == 3 ? 0 : 3;
    for (int slot = 0; slot < 2; ++slot)
      memcpy(values + (2 * group + slot) * size, w + (4 * group + kept[slot]) * size, size);
    patterns[group / 2] |= (uint8_t)((kept[0] | kept[1] << 2) << 4 * (group % 2));
  }
  return OK;
}

static float from_bits(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

static float element(int type, const void* of, int64_t at) {
  return type == INT8 ? ((const int8_t*)of)[at] : from_bits(((const uint16_t*)of)[at]);
}

static uint16_t to_bits(float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  return (uint16_t)((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}

static void wait_us(long us) {
  const struct timespec span = {0, us * 1000};
  nanosleep(&span, 0);
}

int cusparseLtMatmul(const void* handle, const void* plan, const void* alpha, const void* a,
                     const void* b, const void* beta, const void* c, void* d, void* workspace,
                     void** streams, int32_t stream_count) {
  Plan* p = (Plan*)plan;
  const Matmul* m = p->matmul;
  const int id = p->selection.id;
  ++fake_matmuls;
  if (!alive(handle) || !alive(p) || !alive(m)) return INTERNAL_ERROR;
  if (!alive(m->a) || !alive(m->b) || !alive(m->d)) return INTERNAL_ERROR;
  if (fake_fail_next_matmul) {
    const int code = fake_fail_next_matmul;
    fake_fail_next_matmul = 0;
    return code;
  }
  if ((!m->alpha_vector && *(const float*)alpha != 1) || *(const float*)beta != 0 || c != d) return INVALID_VALUE;
  if (stream_count != 1 || !streams || ((uintptr_t)a | (uintptr_t)b | (uintptr_t)d) % 16)
    return INVALID_VALUE;
  if (p->selection.split_k > 1) memset(workspace, 0x77, WORKSPACE);
  wait_us(id == 0 ? 2000 / (p->selection.split_k > 1 ? 2 : 1) : id == 2 ? 0 : id == 1 ? 400 : 100);

  const int64_t rows = m->a->rows, columns = m->a->columns, count = m->d->columns;
  const int type = m->a->type;
  const uint8_t* patterns = (const uint8_t*)a + rows * columns / 2 * (type == INT8 ? 1 : 2);
  ++p->runs;
  for (int64_t token = 0; token < count; ++token)
    for (int64_t row = 0; row < rows; ++row) {
      float sum = 0;
      for (int64_t group = 0; group < columns / 4; ++group) {
        const int64_t at = row * columns / 4 + group;
        const int pattern = patterns[at / 2] >> 4 * (at % 2) & 15;
        for (int slot = 0; slot < 2; ++slot) {
          const int64_t column = 4 * group + (slot ? pattern >> 2 : pattern & 3);
          sum += element(type, a, 2 * at + slot) *
                 element(type, b, m->transpose_b ? token * m->b->stride + column
                                                 : column * m->b->stride + token);
        }
      }
      if (m->alpha_vector && id != 5) sum *= ((const float*)alpha)[row];
      if (m->bias && id != 5) sum += from_bits(m->bias[row]);
      if (m->relu && sum < 0) sum = 0;
      if ((id == 2 && row == rows - 1) || (id == 4 && p->runs > 5)) sum += 1;
      ((uint16_t*)d)[m->d->order == 1 ? token * m->d->stride + row
                                      : row * m->d->stride + token] = to_bits(sum);
    }
  return OK;
}
