/* Go on with a session of meristem from C: read tokens, write on with the likeliest ones, save, load, go on.
 *
 *   cc example.c -o example -L. -lmeristem -Wl,-rpath,'$ORIGIN'
 *   ./example model.safetensors N SESSION NEW_SESSION [TOKEN ...]
 *
 * loads a session (- for a new one), reads the tokens and writes N; then it saves the session, loads it and writes N more. Tokens come of tokenizer.json; runtime.py has a function that makes them of a text. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meristem.h"

static void check(meristem_code code) {
  if (code == MERISTEM_OK) return;
  fprintf(stderr, "%s\n", meristem_error());
  exit((int)code);
}

static void write_on(meristem_model* model, int n) {
  for (int i = 0; i < n; ++i) {
    int32_t token;
    size_t size;
    check(meristem_step(model, NULL, &token));
    const char* piece = meristem_piece(model, token, &size);
    fwrite(piece, 1, size, stdout);
    fflush(stdout);
  }
}

int main(int n_words, char** words) {
  if (n_words < 5) {
    fprintf(stderr, "usage: %s MODEL N SESSION|- NEW_SESSION [TOKEN ...]\n", words[0]);
    return MERISTEM_MISUSED;
  }
  const int n = atoi(words[2]);
  meristem_model* model;
  check(meristem_open(words[1], &model));
  if (strcmp(words[3], "-")) check(meristem_load(model, words[3]));
  for (int i = 5; i < n_words; ++i) {
    const int32_t token = atoi(words[i]);
    check(meristem_read(model, &token, 1));
  }
  write_on(model, n);
  check(meristem_save(model, words[4]));
  meristem_forget(model);
  check(meristem_load(model, words[4]));
  write_on(model, n);
  printf("\n%lld tokens were read; %s has the session.\n", (long long)meristem_n_tokens(model), words[4]);
  meristem_close(model);
  return 0;
}
