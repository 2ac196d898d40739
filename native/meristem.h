/* meristem on the edge: a model that `meristem export edge` wrote, read on from C, one token at a time, on one thread.
 *
 * A handle is a model and one reader of it. Calls with one handle must not overlap; handles know nothing of each other.
 * Every function that gives a meristem_code gives MERISTEM_OK, or what went wrong, and meristem_error() then says it in
 * a sentence. A call that failed has changed nothing, but for MERISTEM_NOT_FINITE of reading, which says so itself.
 */
#ifndef MERISTEM_H
#define MERISTEM_H
#include <stddef.h>
#include <stdint.h>

#define MERISTEM_VERSION 1 /* of this interface and of the files it opens */

#ifdef __cplusplus
extern "C" {
#endif
#if defined(_WIN32)
#define MERISTEM_API __declspec(dllexport)
#else
#define MERISTEM_API __attribute__((visibility("default")))
#endif

typedef struct meristem_model meristem_model;

typedef enum {
  MERISTEM_OK = 0,
  MERISTEM_NO_MEMORY = 1,     /* memory ran out */
  MERISTEM_NO_FILE = 2,       /* a file cannot be read or written */
  MERISTEM_DAMAGED = 3,       /* a file is cut off, changed, of the other byte order, or none of ours */
  MERISTEM_OTHER_VERSION = 4, /* a file of a version that this library does not open */
  MERISTEM_OTHER_MODEL = 5,   /* a session of another model or tokenizer, or in which something else learns than was chosen */
  MERISTEM_NOT_TAKEN = 6,     /* what the file describes is larger or other than this library computes */
  MERISTEM_BAD_TOKEN = 7,     /* a token that is none of the vocabulary */
  MERISTEM_NOT_FINITE = 8,    /* NaN or infinity, in a file or in a prediction */
  MERISTEM_NO_VECTORS = 9,    /* the processor lacks instructions that this library was compiled for */
  MERISTEM_MISUSED = 10       /* a null pointer, a setting out of range, a step before anything was read */
} meristem_code;

/* How a token is drawn. temperature 0 takes the likeliest; top_k 0 draws among all; top_p is in (0, 1]. The draw depends on
 * the seed and on the number of tokens read, and on nothing else. */
typedef struct {
  float temperature;
  float top_p;
  int32_t top_k;
  uint32_t seed;
} meristem_sampling;

/* What the last failed call of this thread says; "" before the first. It stays until the next failure. */
MERISTEM_API const char* meristem_error(void);
MERISTEM_API int meristem_version(void);

/* Open model.safetensors: by its path, or from bytes that are not needed afterwards. *model is NULL on failure. */
MERISTEM_API meristem_code meristem_open(const char* path, meristem_model** model);
MERISTEM_API meristem_code meristem_open_bytes(const void* bytes, size_t size, meristem_model** model);
MERISTEM_API void meristem_close(meristem_model* model); /* NULL is fine */

MERISTEM_API int32_t meristem_vocabulary(const meristem_model* model);
MERISTEM_API int64_t meristem_n_tokens(const meristem_model* model); /* read so far, those of a loaded session included */
/* The prediction of the next token, `vocabulary` logits that the next call may change; NULL before anything was read. */
MERISTEM_API const float* meristem_logits(const meristem_model* model);
/* The bytes of a token, not ended by a zero; NULL and 0 for none of the vocabulary. A character may need several tokens. */
MERISTEM_API const char* meristem_piece(const meristem_model* model, int32_t token, size_t* size);

/* Read tokens. All are looked at before the first is read. */
MERISTEM_API meristem_code meristem_read(meristem_model* model, const int32_t* tokens, size_t n);
/* Draw the next token, read it and give it; `how` NULL takes the likeliest. */
MERISTEM_API meristem_code meristem_step(meristem_model* model, const meristem_sampling* how, int32_t* token);
MERISTEM_API void meristem_forget(meristem_model* model); /* begin afresh, without what was learned */

/* What learns while a session reads beside its memory: learn=weights of meristem. After every `chunk` tokens the weights
 * take one step along the gradient of what these cost, scaled down to grad_clip where it is longer; no token is predicted by
 * weights that saw it, and steps that make a text dearer are undone. rate < 0 takes the one that was found for the model. */
enum { MERISTEM_LEARN_MEMORY = 0 /* nothing beside it */, MERISTEM_LEARN_HEAD = 1, MERISTEM_LEARN_LAST_MLP = 2 };
typedef struct {
  int32_t which;
  int32_t chunk; /* 64 is usual, 2 the least */
  float rate;
  float grad_clip; /* 1 is usual */
} meristem_learning;
typedef struct {
  int32_t which;
  int32_t n_steps; /* taken since what was learned was nothing, or undone */
  int64_t n_chunks;
  float rate;       /* halved each time that steps were undone */
  float saved_nats; /* by those steps, per token, summed over the chunks */
} meristem_learned;
/* Choose before anything is read. Sessions that are loaded afterwards have to learn the same. NULL, at any time, takes the
 * choice back, as before the first: what is loaded learns as it did where it was saved, what begins as the last one. */
MERISTEM_API meristem_code meristem_learn(meristem_model* model, const meristem_learning* how);
MERISTEM_API meristem_code meristem_learning_now(const meristem_model* model, meristem_learned* to);

/* Session files are those of meristem: chat, serve and Session write and open them. */
MERISTEM_API meristem_code meristem_save(meristem_model* model, const char* path);
MERISTEM_API meristem_code meristem_load(meristem_model* model, const char* path);
/* The same in memory. *bytes belongs to the handle, until its next meristem_save_bytes or meristem_close. */
MERISTEM_API meristem_code meristem_save_bytes(meristem_model* model, const void** bytes, size_t* size);
MERISTEM_API meristem_code meristem_load_bytes(meristem_model* model, const void* bytes, size_t size);

/* What a session file says beside its numbers: a value, as JSON, under a name of small letters and '_'. meristem serve keeps
 * what was said under "turns", a list of objects with "text" and "reply". NULL and 0 where there is no such name. */
MERISTEM_API meristem_code meristem_note(meristem_model* model, const char* name, const char* json, size_t size);
MERISTEM_API const char* meristem_noted(const meristem_model* model, const char* name, size_t* size);

#ifdef __cplusplus
}
#endif
#endif
