"""The C of an exported layer that does not depend on its weights. Braces of `FILE` are doubled for str.format."""

FILE = """\
/*
{about}
 *
 * Compile this file with any C99 compiler and link the mathematical functions (-lm). In other files of C or C++:
 *     #define {name}_DECLARATIONS
 *     #include "{file}"
 */
#ifndef {name}_INPUT

#define {name}_INPUT {input}
#define {name}_HIDDEN {hidden}
#define {name}_OUTPUT {output}
#define {name}_LAYERS {layers}

#ifdef __cplusplus
extern "C" {{
#endif

/* One stream: {states} may be set before a step, what follows is working memory. */
typedef struct {{
    float h[{name}_LAYERS][{name}_OUTPUT];
{c}{work}}} {prefix}_state;

/* Sets the initial state to zeros. */
void {prefix}_init({prefix}_state *state);

/* Takes {name}_INPUT numbers of one time step, returns the {name}_OUTPUT numbers of its output, h of the last layer:
 * they are there until the next step. */
const float *{prefix}_step({prefix}_state *state, const float *input);

#ifdef __cplusplus
}}
#endif
#endif

#ifndef {name}_DECLARATIONS
#include <math.h>
#include <stddef.h>
#include <stdint.h>

{constants}
{helpers}
{cell}
void {prefix}_init({prefix}_state *state)
{{
    size_t k;
    for (k = 0; k < {name}_LAYERS; k++) {{
        clear(state->h[k], {name}_OUTPUT);
{clear_c}    }}
}}

const float *{prefix}_step({prefix}_state *state, const float *input)
{{
{locals}{steps}
    return state->h[{name}_LAYERS - 1];
}}
#endif
"""

HELPERS = {
    "clear": """\
static void clear(float *y, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++)
        y[i] = 0.0f;
}
""",
    "copy": """\
static void copy(float *y, const float *x, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++)
        y[i] = x[i];
}
""",
    "multiply": """\
/* y += (I (x) W (x) I) x: W is p x q, row i of it scale[i] times integers; the identities are of size before, after. */
static void multiply(const int8_t *w, const float *scale, size_t before, size_t p, size_t q, size_t after,
                     const float *x, float *y)
{
    size_t b, i, j, a;
    for (b = 0; b < before; b++)
        for (i = 0; i < p; i++)
            for (a = 0; a < after; a++) {
                const float *from = x + b * q * after + a;
                float sum = 0.0f;
                for (j = 0; j < q; j++)
                    sum += (float)w[i * q + j] * from[j * after];
                y[(b * p + i) * after + a] += scale[i] * sum;
            }
}
""",
    "diagonal": """\
/* y += D x, D diagonal. */
static void diagonal(const float *d, size_t n, const float *x, float *y)
{
    size_t i;
    for (i = 0; i < n; i++)
        y[i] += d[i] * x[i];
}
""",
    "residual": """\
/* y += S x: S is sparse, in blocks of one column and `height` rows; counts[s] of them begin in row s * height. */
static void residual(const int8_t *values, const float *scale, const $INDEX *counts, const $INDEX *columns,
                     size_t strips, size_t height, const float *x, float *y)
{
    size_t s, n, i;
    for (s = 0; s < strips; s++)
        for (n = 0; n < (size_t)counts[s]; n++, columns++, values += height)
            for (i = 0; i < height; i++)
                y[s * height + i] += scale[s] * (float)values[i] * x[*columns];
}
""",
}

_SIGMOID = """\
static float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

"""

CELLS = {
    "lstm": _SIGMOID
    + """\
/* The gates are i, f, g, o. */
static void lstm(const float *gates, float *c, float *h)
{
    size_t j;
    for (j = 0; j < $HIDDEN; j++) {
        float f = sigmoid(gates[$HIDDEN + j]), o = sigmoid(gates[3 * $HIDDEN + j]);
        c[j] = f * c[j] + sigmoid(gates[j]) * tanhf(gates[2 * $HIDDEN + j]);
        h[j] = o * tanhf(c[j]);
    }
}
""",
    "gru": _SIGMOID
    + """\
/* The gates are r, z, n: the input's share, then the state's. */
static void gru(const float *gates, float *h)
{
    const float *own = gates + 3 * $HIDDEN;
    size_t j;
    for (j = 0; j < $HIDDEN; j++) {
        float r = sigmoid(gates[j] + own[j]), z = sigmoid(gates[$HIDDEN + j] + own[$HIDDEN + j]);
        float n = tanhf(gates[2 * $HIDDEN + j] + r * own[2 * $HIDDEN + j]);
        h[j] = n + z * (h[j] - n);
    }
}
""",
    "tanh": """\
static void rnn(const float *gates, float *h)
{
    size_t j;
    for (j = 0; j < $HIDDEN; j++)
        h[j] = tanhf(gates[j]);
}
""",
    "relu": """\
static void rnn(const float *gates, float *h)
{
    size_t j;
    for (j = 0; j < $HIDDEN; j++)
        h[j] = gates[j] > 0.0f ? gates[j] : 0.0f;
}
""",
}
