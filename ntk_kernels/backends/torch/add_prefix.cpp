// Adds a prefix to attention over other keys, in one pass over the query rows: features, their products with Z and k,
// and the merge with out and lse. The formulas are those of `merge_prefix` in prefix_term.py, for a single centre:
//
//     x = feature_scale q    N = phi(x) Z    M = max(0, phi(x) k)    top = scale q mu + log_scale
//     lse' = log(e^lse + e^top M)    out' = e^{lse - lse'} out + e^{top - lse'} N
//
// Numbers are float32: query [B, H, L, D], out [B, H, L, Dv], lse and new_lse [B, H, L]; of the state z [Hs, r, Dv],
// k [Hs, r], centers [Hs, D] and log_scale [Hs], contiguous. Threads are those of PyTorch: this file is linked without
// an OpenMP of its own.

#include <cmath>
#include <cstdint>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
constexpr int ROWS = 6;  // of a tile: with two vectors of columns its sums fill the registers
constexpr int MAX_FEATURES = 512;
constexpr int CACHE_LINE = 16;
constexpr int64_t TASK_ROWS = 16 * ROWS;

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));

struct Call {
  const float *query, *z, *k, *centers, *log_scale, *lse;
  float *out, *new_lse;
  int64_t batch, heads, state_heads, rows, head_dim, value_dim, num_features;
  int64_t query_strides[3], out_strides[3], lse_strides[3];
  int32_t is_elu;  // else the features are 1 and x
  float scale, feature_scale, max_exponent;
  int32_t threads;
};

inline Vector load(const float *at) { return *reinterpret_cast<const Unaligned *>(at); }
inline void store(float *at, Vector x) { *reinterpret_cast<Unaligned *>(at) = x; }
inline Vector filled(float x) { return x - Vector{}; }

// e^x for x <= 0, within two units in the last place; 0 below the smallest normal number; NaN stays NaN.
inline Vector exp_of_negative(Vector x) {
  const Vector min = filled(-87.3f), to_integer = filled(12582912.0f);  // 1.5 * 2^23: a sum with it has no fraction
  const Vector y = x < min ? min : x;
  const Vector n = (y * 1.44269504f + to_integer) - to_integer;
  const Vector f = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // y - n ln 2
  Vector p = filled(1.0f / 5040);
  const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1, 1};
  for (float coefficient : coefficients) p = p * f + coefficient;
  const Integers exponents = (__builtin_convertvector(n, Integers) + 127) << 23;
  const Vector e = p * reinterpret_cast<const Vector &>(exponents);
  return x < min ? filled(0.0f) : e;
}

float sum_of(Vector x) {
  float sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += x[i];
  return sum;
}

float dot(const float *a, const float *b, int64_t size) {
  Vector sums = filled(0.0f);
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) sums += load(a + i) * load(b + i);
  float sum = sum_of(sums);
  for (; i < size; i++) sum += a[i] * b[i];
  return sum;
}

void make_features(const Call &call, const float *q, float *phi) {
  int64_t d = 0;
  if (!call.is_elu) {
    *phi++ = 1;
    for (; d < call.head_dim; d++) phi[d] = q[d] * call.feature_scale;
    return;
  }
  const Vector zero = filled(0.0f);
  for (; d + WIDTH <= call.head_dim; d += WIDTH) {
    const Vector x = load(q + d) * call.feature_scale;
    store(phi + d, exp_of_negative(x > zero ? zero : x) + (x < zero ? zero : x));
  }
  for (; d < call.head_dim; d++) {
    const float x = q[d] * call.feature_scale;
    phi[d] = x > 0 ? x + 1 : std::exp(x);
  }
}

// log(1 + e) = 2 artanh(s) for 0 <= e <= 1, with s = e / (2 + e) of at most 1/3.
inline Vector log_of_one_and(Vector e) {
  const Vector s = e / (e + 2.0f), square = s * s;
  Vector p = filled(2.0f / 13);
  const float coefficients[] = {2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2};
  for (float coefficient : coefficients) p = p * square + coefficient;
  return p * s;
}

inline Vector log_add_exp(Vector a, Vector b) {
  const Vector high = a > b ? a : b, low = a > b ? b : a;
  return high + log_of_one_and(exp_of_negative(a == b ? filled(0.0f) : low - high));  // infinities are equal
}

// Up to ROWS rows of a head, from `first` on.
void add_to_rows(const Call &call, int64_t batch, int64_t head, int64_t first, int count) {
  const int64_t r = call.num_features, value_dim = call.value_dim;
  const int64_t state_head = head / (call.heads / call.state_heads);
  const float *z = call.z + state_head * r * value_dim, *k = call.k + state_head * r;
  const float *mu = call.centers ? call.centers + state_head * call.head_dim : nullptr;
  const float log_scale = call.log_scale ? call.log_scale[state_head] : 0;
  const float *q = call.query + batch * call.query_strides[0] + head * call.query_strides[1];
  const float *lse = call.lse + batch * call.lse_strides[0] + head * call.lse_strides[1];
  float *out = call.out + batch * call.out_strides[0] + head * call.out_strides[1] + first * call.out_strides[2];
  float *new_lse = call.new_lse + (batch * call.heads + head) * call.rows;

  static_assert(ROWS <= WIDTH, "numbers of the rows of a tile are vectors");
  float phi[ROWS][MAX_FEATURES], of_prefix[ROWS];
  Vector mass = filled(1.0f), log_mass = filled(0.0f), top = log_mass, before = log_mass;
  for (int i = count; i < ROWS; i++)
    for (int64_t f = 0; f < r; f++) phi[i][f] = 0;
  for (int i = 0; i < count; i++) {
    const float *q_row = q + (first + i) * call.query_strides[2];
    for (int64_t d = 0; d < value_dim; d += CACHE_LINE) __builtin_prefetch(out + i * call.out_strides[2] + d, 1);
    for (int64_t d = 0; d < call.head_dim; d += CACHE_LINE) __builtin_prefetch(q_row + ROWS * call.query_strides[2] + d);
    make_features(call, q_row, phi[i]);
    mass[i] = dot(phi[i], k, r);
    log_mass[i] = std::log(mass[i] < 0 ? 0 : mass[i]);
    top[i] = log_scale + (mu ? call.scale * dot(q_row, mu, call.head_dim) : 0);
    before[i] = lse[(first + i) * call.lse_strides[2]];
  }
  const Vector total = log_add_exp(before, log_mass + top);
  const Vector shift = total == -INFINITY ? filled(INFINITY) : total;  // of a row that sees nothing
  const Vector of_keys = exp_of_negative(before - shift);
  for (int i = 0; i < count; i++) {
    const float exponent = top[i] - shift[i];
    of_prefix[i] = std::exp(!(mass[i] > 0) && exponent > call.max_exponent ? call.max_exponent : exponent);
    new_lse[first + i] = total[i];
  }

  int64_t column = 0;
  for (; column + WIDTH <= value_dim; column += 2 * WIDTH) {
    const bool is_wide = column + 2 * WIDTH <= value_dim;
    Vector sums[ROWS][2];
    for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = filled(0.0f);
    const float *z_row = z + column;
    for (int64_t f = 0; f < r; f++, z_row += value_dim) {
      const Vector left = load(z_row), right = load(z_row + (is_wide ? WIDTH : 0));
      for (int i = 0; i < ROWS; i++) {
        sums[i][0] += left * phi[i][f];
        sums[i][1] += right * phi[i][f];
      }
    }
    for (int i = 0; i < ROWS; i++) {  // a number of times that is known, so that the sums are in registers
      if (i >= count) break;
      float *at = out + i * call.out_strides[2] + column;
      store(at, load(at) * of_keys[i] + sums[i][0] * of_prefix[i]);
      if (is_wide) store(at + WIDTH, load(at + WIDTH) * of_keys[i] + sums[i][1] * of_prefix[i]);
    }
  }
  for (column = value_dim / WIDTH * WIDTH; column < value_dim; column++)
    for (int i = 0; i < count; i++) {
      float sum = 0, *at = out + i * call.out_strides[2] + column;
      for (int64_t f = 0; f < r; f++) sum += phi[i][f] * z[f * value_dim + column];
      *at = *at * of_keys[i] + sum * of_prefix[i];
    }
}

}  // namespace

extern "C" void add_prefix(const Call *call) {
  const int64_t tasks = (call->rows + TASK_ROWS - 1) / TASK_ROWS;
#pragma omp parallel for num_threads(call->threads) if (call->threads > 1)
  for (int64_t task = 0; task < call->batch * call->heads * tasks; task++) {
    const int64_t head = task / tasks, first = task % tasks * TASK_ROWS;
    const int64_t stop = first + TASK_ROWS < call->rows ? first + TASK_ROWS : call->rows;
    for (int64_t row = first; row < stop; row += ROWS)
      add_to_rows(*call, head / call->heads, head % call->heads, row, stop - row < ROWS ? int(stop - row) : ROWS);
  }
}
