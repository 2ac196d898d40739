// The plain C interface of the native core: what Python binds by ctypes. One file, compiled once for each processor level
// (src/meristem/native/build.py), without torch and without any library but that of the compiler.
//
// The interface has a version, ABI. Raise it here and in src/meristem/native/library.py when a function changes.
#include "decode.hpp"

#define MERISTEM_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int ABI = 1;

// Of the interface that this library was compiled with; the caller compares it before it calls anything else.
MERISTEM_EXPORT int meristem_abi() { return ABI; }

// One token of a whole model (decode.hpp), in float32 and in float64. A decoder never changes and may serve several threads,
// each with readers and room of its own; sizes are in numbers. ``open`` gives null where there is no memory for the weights;
// ``step`` gives 1, and has done nothing, where a token is none of the vocabulary.
#define MERISTEM_DECODER(NAME, T) \
  MERISTEM_EXPORT void* meristem_decoder_open_##NAME( \
      const meristem::decoding::ModelShape* model, const meristem::decoding::LayerShape* shapes, \
      const meristem::decoding::ModelWeights<T>* ends, const meristem::decoding::LayerWeights<T>* layers) { \
    try { \
      return new meristem::decoding::Decoder<T>(*model, shapes, *ends, layers); \
    } catch (const std::bad_alloc&) { \
      return nullptr; \
    } \
  } \
  MERISTEM_EXPORT void meristem_decoder_close_##NAME(meristem::decoding::Decoder<T>* decoder) { delete decoder; } \
  MERISTEM_EXPORT int64_t meristem_decoder_block_##NAME(const meristem::decoding::Decoder<T>* decoder) { \
    return decoder->block_size(); \
  } \
  MERISTEM_EXPORT int64_t meristem_decoder_logits_##NAME(const meristem::decoding::Decoder<T>* decoder) { \
    return decoder->logits_stride(); \
  } \
  MERISTEM_EXPORT int64_t meristem_decoder_room_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t rows) { \
    return decoder->room_size(rows); \
  } \
  MERISTEM_EXPORT void meristem_decoder_place_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t layer, \
                                                     meristem::decoding::Place* place) { \
    *place = decoder->place(layer); \
  } \
  MERISTEM_EXPORT int meristem_decoder_step_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t rows, \
                                                   const int64_t* tokens, T* const* blocks, int64_t* n_read, T* logits, \
                                                   T* room) { \
    return !decoder->step(int(rows), tokens, blocks, n_read, logits, room); \
  }
MERISTEM_DECODER(f32, float)
MERISTEM_DECODER(f64, double)
