// Read refengine's vectors in C99: compute scans and routers in float, and compare logits of models.
//
//     refengine vectors write VECTORS
//     cc -std=c99 -O2 tools/vectors/consumer.c -o consumer -lm && ./consumer VECTORS OUTPUTS
//
// Writes what it computes (float32) to the folders ssd_scan and route of OUTPUTS, which must exist. Logits that
// another program wrote are compared where OUTPUTS holds model/NAME.safetensors. For little-endian machines.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { long shape[8], size; int axes; double *data; } Tensor;
typedef char *File; // its bytes: 8 with the length of the header, the header, the data

static void fail(const char *what, const char *which) { fprintf(stderr, "%s: %s\n", what, which); exit(2); }

static char *after(char *text, const char *key) { // the text behind "key":
    char quoted[256];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    char *found = text ? strstr(text, quoted) : NULL;
    return found ? found + strlen(quoted) : NULL;
}

static double number(char *line, const char *key) { // a number, true or false of the manifest
    char *value = after(line, key);
    return *value == 't' ? 1 : *value == 'f' ? 0 : atof(value);
}

static char *slurp(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    long size = ftell(file), done = fseek(file, 0, SEEK_SET);
    char *bytes = calloc(size + 1, 1);
    if (done || fread(bytes, 1, size, file) != (size_t)size) fail("cannot read", path);
    return fclose(file), bytes;
}

static Tensor get(File file, const char *name) { // size 0 where there is none
    Tensor t = {{0}, 0, 0, NULL};
    char *entry = after(file + 8, name);
    uint64_t header;
    memcpy(&header, file, 8);
    if (!entry || (uint64_t)(entry - file) > 8 + header) return t;
    char *at = after(entry, "shape") + 1;
    for (t.size = 1; *at != ']'; at += *at == ',') t.size *= t.shape[t.axes++] = strtol(at, &at, 10);
    char *data = file + 8 + header + strtol(after(entry, "data_offsets") + 1, NULL, 10);
    char *dtype = after(entry, "dtype") + 1;
    t.data = malloc(t.size * sizeof(double));
    for (long i = 0; i < t.size; i++) {
        float f = 0; int64_t n = 0; uint32_t word = 0;
        if (!strncmp(dtype, "F64", 3)) memcpy(&t.data[i], data + 8 * i, 8);
        else if (!strncmp(dtype, "F32", 3)) memcpy(&f, data + 4 * i, 4), t.data[i] = f;
        else if (!strncmp(dtype, "I64", 3)) memcpy(&n, data + 8 * i, 8), t.data[i] = n;
        else if (!strncmp(dtype, "BF16", 4)) { // the upper half of a float
            memcpy((char *)&word + 2, data + 2 * i, 2);
            memcpy(&f, &word, 4), t.data[i] = f;
        } else fail("a dtype that is not read here", name);
    }
    return t;
}

static Tensor weight(File file, const char *key) {
    char name[256];
    return snprintf(name, sizeof name, "backbone.layers.0.mixer.%s", key), get(file, name);
}

static Tensor like(Tensor t) { t.data = calloc(t.size, sizeof(double)); return t; }

static void save(const char *path, int count, const char **names, Tensor *tensors) { // as F32
    char header[1024];
    int n = sprintf(header, "{");
    long end = 0;
    for (int i = 0; i < count; i++) {
        n += sprintf(header + n, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[", i ? "," : "", names[i]);
        for (int k = 0; k < tensors[i].axes; k++) n += sprintf(header + n, "%s%ld", k ? "," : "", tensors[i].shape[k]);
        n += sprintf(header + n, "],\"data_offsets\":[%ld,%ld]}", end, end + 4 * tensors[i].size);
        end += 4 * tensors[i].size;
    }
    uint64_t length = n += sprintf(header + n, "}");
    FILE *file = fopen(path, "wb");
    if (!file) fail("cannot write", path);
    fwrite(&length, 8, 1, file), fwrite(header, 1, n, file);
    for (int i = 0; i < count; i++)
        for (long k = 0; k < tensors[i].size; k++) fwrite(&(float){(float)tensors[i].data[k]}, 4, 1, file);
    fclose(file);
}

// S[t] = exp(dt A) S[t-1] + dt x[t] B[t]',   y[t] = S[t] C[t] + D x[t];   dt = softplus(dt + dt_bias)
static void scan(File f, char *line, Tensor *y, Tensor *state) {
    Tensor x = get(f, "in.x"), dt_in = get(f, "in.dt"), B = get(f, "in.B"), C = get(f, "in.C"), S = get(f, "in.S");
    Tensor A_log = weight(f, "A_log"), D = weight(f, "D"), bias = weight(f, "dt_bias"), lengths = get(f, "in.lengths");
    long b = x.shape[0], l = x.shape[1], h = x.shape[2], p = x.shape[3], g = B.shape[2], n = B.shape[3];
    char *limit = after(line, "dt_limit") + 1, *high_at;
    float low = strtof(limit, &high_at), high = high_at[1] == 'n' ? INFINITY : strtof(high_at + 1, NULL); // null
    *y = like(x);
    for (long i = 0; i < b * l; i++) {
        long row = i / l;
        if (lengths.size && i % l >= lengths.data[row]) continue; // padding does not touch S
        for (long head = 0; head < h; head++) {
            float dt = dt_in.data[i * h + head] + bias.data[head];
            dt = fminf(fmaxf(dt > 30 ? dt : log1pf(expf(dt)), low), high);
            float decay = expf(-expf(A_log.data[head]) * dt);
            double *b_row = B.data + (i * g + head / (h / g)) * n, *c_row = C.data + (i * g + head / (h / g)) * n;
            for (long r = 0; r < p; r++) {
                float value = x.data[(i * h + head) * p + r], sum = D.data[head] * value;
                double *s = S.data + ((row * h + head) * p + r) * n;
                for (long k = 0; k < n; k++) {
                    s[k] = (float)(decay * (float)s[k] + dt * value * (float)b_row[k]);
                    sum += (float)s[k] * (float)c_row[k];
                }
                y->data[(i * h + head) * p + r] = sum;
            }
        }
    }
    *state = S;
}

static int best(const float *score, int count, const char *taken) { // of equal ones the lower index
    int found = -1;
    for (int e = 0; e < count; e++)
        if (!taken[e] && (found < 0 || score[e] > score[found])) found = e;
    return found;
}

// s = sigmoid(h gate');  the k best of s + bias, weighted by s over the sum of the chosen, times a scale
static void route(File f, char *line, Tensor *out) {
    Tensor h = get(f, "in.h"), gate = weight(f, "gate.weight"), bias = weight(f, "gate.e_score_correction_bias");
    int E = gate.shape[0], d = gate.shape[1], k = number(line, "num_experts_per_tok"), groups = number(line, "n_group");
    float s[512], c[512];
    *out = like((Tensor){{h.shape[0], h.shape[1], E}, h.shape[0] * h.shape[1] * E, 3, NULL});
    for (long i = 0; i < h.shape[0] * h.shape[1]; i++) {
        char taken[512] = {0}, kept[512] = {0};
        float group[512] = {0}, sum = 1e-20f, scale;
        int chosen[512];
        for (int e = 0; e < E; e++) {
            float logit = 0;
            for (int j = 0; j < d; j++) logit += (float)h.data[i * d + j] * (float)gate.data[e * d + j];
            s[e] = 1 / (1 + expf(-logit));
            c[e] = s[e] + (float)bias.data[e];
        }
        for (int size = E / groups, q = 0; groups > 1 && q < groups; q++) { // the sum of its two best
            char used[512] = {0};
            int first = best(c + q * size, size, used);
            used[first] = 1;
            group[q] = c[q * size + first] + c[q * size + best(c + q * size, size, used)];
        }
        for (int q = 0; groups > 1 && q < number(line, "topk_group"); q++) kept[best(group, groups, kept)] = 1;
        for (int e = 0; groups > 1 && e < E; e++) taken[e] = !kept[e / (E / groups)];
        for (int q = 0; q < k; q++) taken[chosen[q] = best(c, E, taken)] = 1, sum += s[chosen[q]];
        scale = number(line, "routed_scaling_factor") / (number(line, "norm_topk_prob") ? sum : 1);
        for (int q = 0; q < k; q++) out->data[i * E + chosen[q]] = s[chosen[q]] * scale;
    }
}

static int judge(char *line, const char *name, const char *output, File f, Tensor mine) { // 1 where it is wrong
    char key[64];
    snprintf(key, sizeof key, "out.%s", output);
    Tensor right = get(f, key), lengths = get(f, "in.lengths");
    char *stated = after(after(line, "outputs"), output);
    double allowed = atof(after(after(stated, "tolerance"), "float32")), scale = 1, worst = 0;
    char *valid = after(stated, "valid"), *end = strchr(stated, '}');
    for (long i = 0; i < right.size; i++) scale = fmax(scale, fabs(right.data[i]));
    for (long i = 0, per = right.size / (right.shape[0] * right.shape[1]); i < right.size; i++) {
        if (valid && valid < end && i / per % right.shape[1] >= lengths.data[i / per / right.shape[1]]) continue;
        double off = mine.size == right.size ? fabs(mine.data[i] - right.data[i]) / scale : INFINITY;
        if (!(off <= worst)) worst = off; // NaN stays
    }
    printf("%s  %s %s: %.1e of %.1e in float32\n", worst <= allowed ? "pass" : "FAIL", name, output, worst, allowed);
    return !(worst <= allowed);
}

int main(int argc, char **argv) {
    char path[4096], answers[4096], name[256], *line = NULL;
    int wrong = 0;
    if (argc == 3) snprintf(path, sizeof path, "%s/manifest.json", argv[1]), line = slurp(path);
    if (!line) fail("usage", "consumer VECTORS OUTPUTS, where VECTORS holds manifest.json");
    for (line = strtok(line, "\n"); line; line = strtok(NULL, "\n")) { // one case a line
        char *operation = after(line, "operation");
        if (!operation || !after(line, "name") || sscanf(after(line, "name"), "\"%255[^\"]", name) != 1) continue;
        snprintf(path, sizeof path, "%s/%s.safetensors", argv[1], name);
        snprintf(answers, sizeof answers, "%s/%s.safetensors", argv[2], name);
        Tensor mine[2];
        int is_scan = !strncmp(operation, "\"ssd_scan\"", 10);
        if (is_scan || !strncmp(operation, "\"route\"", 7)) {
            File file = slurp(path);
            const char *outputs[2] = {is_scan ? "y" : "weights", "S"};
            is_scan ? scan(file, line, &mine[0], &mine[1]) : route(file, line, &mine[0]);
            save(answers, 1 + is_scan, outputs, mine);
            for (int i = 0; i <= is_scan; i++) wrong += judge(line, name, outputs[i], file, mine[i]);
        } else if (!strncmp(operation, "\"model\"", 7)) {
            File theirs = slurp(answers);
            if (theirs) wrong += judge(line, name, "logits", slurp(path), get(theirs, "logits"));
        }
    }
    return wrong ? 1 : 0;
}
