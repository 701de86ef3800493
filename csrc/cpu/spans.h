// Division of a batch into pieces of work for the CPU operations, and the number of threads.
#pragma once

#include <omp.h>

#include <algorithm>

#include "vector.h"

namespace moreau::cpu {

// Fewest elements for each thread: waking one takes more than 100 microseconds on a busy machine, and less work than
// this would not pay for it.
constexpr int64_t kElementsPerThread = 100000;

template <class F>
void parallel_for(int64_t items, int64_t elements, F&& f) {
  const int64_t threads = std::min({int64_t(omp_get_max_threads()), items, elements / kElementsPerThread});
  if (threads <= 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < items; ++i) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < items; ++i) f(i);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A span is a contiguous piece of one input's memory: whole positions, or some channels of one position where one
// position exceeds kSpan. Spans depend on the extents alone, so sums over them do not depend on the number of threads.
struct Span {
  int64_t input, position, positions, channel, channels;
  int64_t start;  // memory offset within the input
  int64_t size;
};

struct Spans {
  Extents extents;
  int64_t positions_each, channels_each, by_position, by_channel;

  explicit Spans(const Extents& e) : extents(e) {
    positions_each = std::max<int64_t>(1, kSpan / std::max<int64_t>(1, e.channels));
    channels_each = std::min(e.channels, kSpan);
    by_position = ceil_div(e.positions, positions_each);
    by_channel = e.channels ? ceil_div(e.channels, channels_each) : 0;
  }
  int64_t per_input() const { return by_position * by_channel; }
  int64_t count() const { return extents.batch * per_input(); }
  int64_t features() const { return extents.channels * extents.positions; }

  Span operator[](int64_t i) const {
    const int64_t input = i / per_input(), rest = i % per_input();
    const int64_t p = rest / by_channel * positions_each, c = rest % by_channel * channels_each;
    const int64_t positions = std::min(positions_each, extents.positions - p);
    const int64_t channels = std::min(channels_each, extents.channels - c);
    return {input, p, positions, c, channels, p * extents.channels + c, positions * channels};
  }
};

// Normals of one sample at the features of a span, in memory order. Returns their first address, in `z`.
template <class S>
const S* span_normals(const Span& span, const Extents& e, const Noise& noise, uint32_t sample, S* z, S* scratch) {
  const uint64_t key = uint64_t(noise.keys[span.input]);
  const uint32_t step = uint32_t(*noise.step);
  alignas(64) uint32_t words[kNormals];
  const auto draw = [&](S* to, int64_t element, int64_t n) {
    const int64_t first = element / 4, lead = element % 4;
    const int64_t batches = ceil_div(lead + n, 4 * kBatch);
    philox_words(words, batches, key, uint64_t(first), sample, step);
    normals_range(to, words, batches);
    return to + lead;
  };
  if (e.channels == 1) return draw(z, noise.element_offset + span.position, span.positions);
  for (int64_t c = 0; c < span.channels; ++c) {
    const S* row =
        draw(scratch, noise.element_offset + (span.channel + c) * e.positions + span.position, span.positions);
    for (int64_t i = 0; i < span.positions; ++i) z[i * span.channels + c] = row[i];
  }
  return z;
}

// noisy[k] = base + sigma z(k) on one span; `base` is x + displacement there.
template <class T, class S>
void write_noisy(const Span& span, const Extents& e, const Noise& noise, const S* base, T* noisy) {
  const int64_t features = e.channels * e.positions;
  const auto row = [&](int64_t k) { return noisy + (span.input * noise.samples + k) * features + span.start; };
  if (!noise.sigma) {
    for (int64_t k = 0; k < noise.samples; ++k) copy_range(row(k), base, span.size);
    return;
  }
  const S sigma = static_cast<const S*>(noise.sigma)[span.input];
  alignas(64) S z[kNormals], scratch[kNormals];
  for (int64_t k = 0; k < noise.samples;) {
    const int64_t sample = noise.sample_offset + k;
    const bool mirrored = noise.antithetic && sample % 2;
    const S* drawn = span_normals(span, e, noise, uint32_t(sample - mirrored), z, scratch);
    if (noise.antithetic && !mirrored && k + 1 < noise.samples) {
      noisy_pair(row(k), row(k + 1), base, drawn, sigma, span.size);
      k += 2;
    } else {
      noisy_range(row(k), base, drawn, mirrored ? -sigma : sigma, span.size);
      k += 1;
    }
  }
}

}  // namespace moreau::cpu
