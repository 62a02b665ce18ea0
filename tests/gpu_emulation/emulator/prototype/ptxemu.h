// ptxemu.cpp - a small functional PTX emulator (one warp = 32 lanes in lock-step, min-PC reconvergence).
// Executes PTX text as emitted by nvcc 13 (sm_75..sm_90) and Triton 3.8 (sm_80/sm_90) on host memory.
// Checks: out-of-bounds, misalignment, uninitialised shared reads, shared + global data races, divergent barriers,
// warp-sync mask violations, cp.async read before wait. Counters: instructions, sectors, bank conflicts.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <string>
#include <vector>
#include <map>
#include <unordered_map>
#include <functional>
#include <random>
#include <stdexcept>
#include <algorithm>
#include <set>
#include <memory>
#include <array>
using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t; using i32 = int32_t; using i64 = int64_t;
typedef _Float16 hf;
static inline float bf2f(u16 u) { u32 x = (u32)u << 16; float f; memcpy(&f, &x, 4); return f; }
static inline u16 f2bf(float f) { u32 x; memcpy(&x, &f, 4); if (f != f) return 0x7FFF; return (u16)((x + 0x7FFF + ((x >> 16) & 1)) >> 16); }
static inline float h2f(u16 u) { hf h; memcpy(&h, &u, 2); return (float)h; }
static inline u16 f2h(float f) { hf h = (hf)f; u16 u; memcpy(&u, &h, 2); return u; }
template <class T> static inline T bits(u64 v) { T t; memcpy(&t, &v, sizeof t); return t; }
template <class T> static inline u64 pack(T t) { u64 v = 0; memcpy(&v, &t, sizeof t); return v; }
enum Ty : u8 { T_NONE, U8, U16, U32, U64, S8, S16, S32, S64, B8, B16, B32, B64, B128, F16, F16X2, BF16, BF16X2, F32, F64, F32X2, PRED, TF32, E4M3, E5M2 };
static const std::map<std::string, Ty> TYS = {{"u8", U8}, {"u16", U16}, {"u32", U32}, {"u64", U64}, {"s8", S8}, {"s16", S16}, {"s32", S32}, {"s64", S64}, {"b8", B8}, {"b16", B16}, {"b32", B32}, {"b64", B64}, {"b128", B128},
  {"f16", F16}, {"f16x2", F16X2}, {"bf16", BF16}, {"bf16x2", BF16X2}, {"f32", F32}, {"f64", F64}, {"f32x2", F32X2}, {"pred", PRED}, {"tf32", TF32}, {"e4m3", E4M3}, {"e5m2", E5M2}};
static int tysz(Ty t) { switch (t) { case U8: case S8: case B8: case E4M3: case E5M2: return 1; case U16: case S16: case B16: case F16: case BF16: return 2; case U64: case S64: case B64: case F64: case F32X2: return 8; case B128: return 16; default: return 4; } }
static bool issigned(Ty t) { return t == S8 || t == S16 || t == S32 || t == S64; }
static bool isfloat(Ty t) { return t == F16 || t == BF16 || t == F32 || t == F64 || t == F16X2 || t == BF16X2 || t == TF32 || t == F32X2; }
struct Err : std::runtime_error { using std::runtime_error::runtime_error; };

enum OK : u8 { O_NONE, O_REG, O_IMM, O_SPEC, O_MEM, O_VEC, O_SINK, O_SYM };
enum Space : u8 { GEN, GLOBAL, SHARED, LOCAL, PARAM, CONSTS };
struct Sym { Space sp; u64 off; u64 size; };
struct Opnd { OK k = O_NONE; int reg = -1; u64 imm = 0; bool flt = false; double fval = 0; int spec = 0; bool neg = false; int reg2 = -1; i64 off = 0; int symsp = -1; std::string sym; std::vector<Opnd> v; };
struct Instr { std::string op, text; std::vector<std::string> m; std::vector<Ty> t; std::vector<Opnd> o; int g = -1; bool gneg = false; int target = -1; int code = 0; int line = 0; Space sp = GEN; int vec = 1; bool ftz = false; 
  bool has(const char* s) const { for (auto& x : m) if (x == s) return true; return false; } };
struct Param { std::string name; int size, align, off; };
struct Kernel { std::string name; std::vector<Param> params; int psize = 0; std::vector<Instr> code; int nreg = 0; u64 shared = 0, local = 0; std::map<std::string, Sym> syms; std::string dynsym; };
struct Module { std::map<std::string, Kernel> k; std::map<std::string, Sym> syms; std::vector<std::unique_ptr<std::vector<u8>>> globals; u64 mshared = 0; std::string src, target; std::string dynsym; };
static const u64 SHB = 0x7100000000000000ull, LCB = 0x7200000000000000ull;

enum SpecReg { S_TIDX, S_TIDY, S_TIDZ, S_NTIDX, S_NTIDY, S_NTIDZ, S_CTAX, S_CTAY, S_CTAZ, S_NCTAX, S_NCTAY, S_NCTAZ, S_LANE, S_WARP, S_NWARP, S_CLOCK, S_LMEQ, S_LMLT, S_LMLE, S_LMGT, S_LMGE, S_SMID, S_DYNS, S_TOTS, S_CLRANK, S_ZERO, S_ONE };
static const std::map<std::string, int> SPECS = {{"%tid.x", S_TIDX}, {"%tid.y", S_TIDY}, {"%tid.z", S_TIDZ}, {"%ntid.x", S_NTIDX}, {"%ntid.y", S_NTIDY}, {"%ntid.z", S_NTIDZ}, {"%ctaid.x", S_CTAX}, {"%ctaid.y", S_CTAY}, {"%ctaid.z", S_CTAZ},
  {"%nctaid.x", S_NCTAX}, {"%nctaid.y", S_NCTAY}, {"%nctaid.z", S_NCTAZ}, {"%laneid", S_LANE}, {"%warpid", S_WARP}, {"%nwarpid", S_NWARP}, {"%clock", S_CLOCK}, {"%clock64", S_CLOCK}, {"%globaltimer", S_CLOCK}, {"%lanemask_eq", S_LMEQ}, {"%lanemask_lt", S_LMLT},
  {"%lanemask_le", S_LMLE}, {"%lanemask_gt", S_LMGT}, {"%lanemask_ge", S_LMGE}, {"%smid", S_SMID}, {"%dynamic_smem_size", S_DYNS}, {"%total_smem_size", S_TOTS}, {"%cluster_ctarank", S_ZERO}, {"%cluster_ctaid.x", S_ZERO}, {"%cluster_nctaid.x", S_ONE}, {"%cluster_nctarank", S_ONE}, {"%is_explicit_cluster", S_ZERO}};

// ------------------------------------------------------------------ parser
struct Parser {
  Module& M; std::vector<std::pair<std::string, int>> tk; size_t p = 0;
  Parser(Module& m, const std::string& s) : M(m) { lex(s); }
  static bool idc(char c) { return isalnum((u8)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
  void lex(const std::string& s) {
    size_t i = 0, n = s.size(); int line = 1;
    while (i < n) { char c = s[i];
      if (c == '\n') { line++; i++; }
      else if (isspace((u8)c)) i++;
      else if (c == '/' && s[i + 1] == '/') { while (i < n && s[i] != '\n') i++; }
      else if (c == '/' && s[i + 1] == '*') { i += 2; while (i < n && !(s[i] == '*' && s[i + 1] == '/')) { line += s[i] == '\n'; i++; } i += 2; }
      else if (c == '"') { size_t j = i + 1; while (s[j] != '"') { if (s[j] == '\\') j++; j++; } tk.push_back({s.substr(i, j + 1 - i), line}); i = j + 1; }
      else if (idc(c)) { size_t j = i; while (j < n && (idc(s[j]) || (s[j] == ':' && s[j + 1] == ':' && idc(s[j + 2]) && (++j, true)))) j++; tk.push_back({s.substr(i, j - i), line}); i = j; }
      else { tk.push_back({std::string(1, c), line}); i++; } }
    tk.push_back({"", line});
  }
  const std::string& cur() { return tk[p].first; }
  std::string next() { return tk[p++].first; }
  [[noreturn]] void err(const std::string& m) { throw Err("PTX parse error, line " + std::to_string(tk[p].second) + ": " + m + " near '" + cur() + "'"); }
  void expect(const char* s) { if (cur() != s) err(std::string("expected ") + s); p++; }
  static u64 align(u64 x, u64 a) { return (x + a - 1) / a * a; }
  static u64 num(const std::string& s) { return s.size() > 1 && s[0] == '0' && s[1] != 'x' && s[1] != 'X' && isdigit((u8)s[1]) ? strtoull(s.c_str(), 0, 8) : strtoull(s.c_str(), 0, 0); }
  struct Func { std::vector<std::string> rets, formals; size_t body; };
  std::map<std::string, Func> funcs; std::vector<std::string> retlabel;
  void prescan() { for (size_t q = 0; q + 1 < tk.size(); ++q) if (tk[q].first == ".func") { size_t s = q + 1; Func f; auto plist = [&](std::vector<std::string>& v) { s++; while (tk[s].first != ")") { if (tk[s + 1].first == "," || tk[s + 1].first == ")" || tk[s + 1].first == "[") { v.push_back(tk[s].first); if (tk[s + 1].first == "[") s += 3; } s++; } s++; };
      while (tk[s].first[0] == '.') s++; if (tk[s].first == "(") plist(f.rets); std::string nm = tk[s++].first; if (tk[s].first == "(") plist(f.formals); while (tk[s].first != "{" && tk[s].first != ";") s++; if (tk[s].first == "{") { f.body = s; funcs[nm] = f; } } }
  void call(Instr& I) { // inlined at parse time (no recursion)
    std::vector<std::string> r, a; std::string nm; if (cur() == "(") { p++; while (cur() != ")") { r.push_back(next()); if (cur() == ",") p++; } p++; if (cur() == ",") p++; } nm = next(); if (cur() == ",") { p++; if (cur() == "(") { p++; while (cur() != ")") { a.push_back(next()); if (cur() == ",") p++; } p++; } } while (cur() != ";") p++; p++;
    auto it = funcs.find(nm); if (it == funcs.end()) { I.text = "call " + nm; fin(I); if (nm == "vprintf") I.code = C_NOP_; K->code.push_back(I); return; }
    if (retlabel.size() > 30) err("recursive function"); Func& f = it->second; if (f.rets.size() != r.size() || f.formals.size() != a.size()) err("call arguments of " + nm);
    std::string end = "$ret#" + std::to_string(scopeid++); if (I.g >= 0) { Instr b; b.op = "bra"; b.line = I.line; b.g = I.g; b.gneg = !I.gneg; b.text = "skip call"; Opnd o; o.k = O_SYM; o.sym = end; b.o.push_back(o); fin(b); K->code.push_back(b); }
    for (size_t i = 0; i < r.size(); ++i) K->syms[f.rets[i]] = K->syms[r[i]]; for (size_t i = 0; i < a.size(); ++i) K->syms[f.formals[i]] = K->syms[a[i]];
    size_t save = p; int fx = fixup; size_t body = f.body; retlabel.push_back(end); p = f.body + 1; block(); retlabel.pop_back(); p = save + (body < save ? fixup - fx : 0); labels[end] = K->code.size(); }
  static const int C_NOP_;
  void parse() {
    prescan();
    while (cur() != "") {
      const std::string& c = cur();
      if (c == ".version") { p += 2; }
      else if (c == ".target") { p++; M.target = next(); while (cur() == ",") { p += 2; } }
      else if (c == ".address_size") p += 2;
      else if (c == ".file") { p += 3; while (cur() == ",") p += 2; }
      else if (c == ".section") { while (cur() != "{") p++; int d = 0; do { if (cur() == "{") d++; if (cur() == "}") d--; p++; } while (d); }
      else if (c == ".extern" || c == ".visible" || c == ".weak" || c == ".common") { bool ext = c == ".extern"; p++; if (cur() == ".func" && ext) { while (cur() != ";") p++; p++; } }
      else if (c == ".func") { // device functions are not supported unless unused: skip the body
        while (cur() != "{" && cur() != ";") p++; if (cur() == ";") { p++; continue; } int d = 0; do { if (cur() == "{") d++; if (cur() == "}") d--; p++; } while (d); }
      else if (c == ".entry") { p++; entry(); }
      else if (c == ".shared" || c == ".global" || c == ".const") var(nullptr, M.syms);
      else if (c == ";") p++;
      else if (c == ".pragma" || c == ".loc" || c == ".alias") { while (cur() != ";") p++; p++; }
      else err("unknown directive");
    }
  }
  void var(Kernel* K, std::map<std::string, Sym>& S) {
    std::string sp = next(); u64 al = 1; Ty ty = B8; int vec = 1;
    while (cur()[0] == '.') { std::string d = next(); if (d == ".align") al = num(next()); else if (d == ".v2") vec = 2; else if (d == ".v4") vec = 4; else if (d == ".ptr" ) {} else { auto it = TYS.find(d.substr(1)); if (it != TYS.end()) ty = it->second; else if (d == ".attribute") { while (cur() != ")") p++; p++; } } }
    for (;;) {
      std::string name = next(); u64 n = 1; bool arr = false, open = false;
      while (cur() == "[") { p++; arr = true; if (cur() == "]") { open = true; n = 0; } else n *= num(next()); expect("]"); }
      u64 sz = n * tysz(ty) * vec; al = std::max<u64>(al, tysz(ty)); (void)arr;
      if (sp == ".shared") {
        if (open) { (K ? K->dynsym : M.dynsym) = name; S[name] = {SHARED, ~0ull, 0}; }
        else { u64& top = K ? K->shared : M.mshared; top = align(top, al); S[name] = {SHARED, top, sz}; top += sz; }
      } else if (sp == ".local") { K->local = align(K->local, al); S[name] = {LOCAL, K->local, sz}; K->local += sz; }
      else { M.globals.emplace_back(new std::vector<u8>(sz + 256)); u8* b = (u8*)align((u64)M.globals.back()->data(), 256); S[name] = {GLOBAL, (u64)b, sz};
        if (cur() == "=") { p++; u64 k = 0; std::function<void()> init = [&]() { if (cur() == "{") { p++; while (cur() != "}") { init(); if (cur() == ",") p++; } p++; } else { bool neg = cur() == "-"; if (neg) p++; std::string t = next(); u64 v = 0;
            if (t.size() > 2 && t[0] == '0' && (t[1] == 'f' || t[1] == 'F') && t.size() == 10) v = strtoull(t.c_str() + 2, 0, 16); else if (t.size() == 18 && t[0] == '0' && (t[1] == 'd' || t[1] == 'D')) v = strtoull(t.c_str() + 2, 0, 16); else v = num(t);
            if (neg) v = -v; memcpy(b + k, &v, tysz(ty)); k += tysz(ty); } }; init(); } }
      if (cur() == ",") { p++; continue; }
      expect(";"); break;
    }
  }
  int fixup = 0; Kernel* K; std::vector<std::map<std::string, int>> scopes; std::vector<std::map<std::string, std::string>> lscopes; std::map<std::string, int> labels; int scopeid = 0;
  void entry() {
    std::string name = next(); Kernel& k = M.k[name]; K = &k; k.name = name; k.syms = M.syms; k.shared = M.mshared; k.dynsym = M.dynsym;
    if (cur() == "(") { p++; int off = 0;
      while (cur() != ")") { Param pr; pr.align = 1; Ty ty = B8; u64 n = 1;
        while (cur()[0] == '.') { std::string d = next(); if (d == ".align") { pr.align = num(next()); } else { auto it = TYS.find(d.substr(1)); if (it != TYS.end()) ty = it->second; } }
        // ".ptr .global .align N" attribute gives the pointee's alignment, not the parameter's
        pr.name = next(); if (cur() == "[") { p++; n = num(next()); expect("]"); } else pr.align = tysz(ty);
        pr.size = n * tysz(ty); pr.align = std::max(pr.align, tysz(ty)); off = align(off, pr.align); pr.off = off; off += pr.size; k.params.push_back(pr); k.syms[pr.name] = {PARAM, (u64)pr.off, (u64)pr.size};
        if (cur() == ",") p++; }
      p++; k.psize = off; }
    while (cur() != "{") p++;   // .maxntid etc.
    scopes.clear(); lscopes.clear(); labels.clear(); p++; block(); 
    for (auto& I : k.code) if (I.op == "bra") { auto it = labels.find(I.o.back().sym); if (it == labels.end()) throw Err("unknown label " + I.o.back().sym); I.target = it->second; }
    Instr r; r.op = "ret"; r.text = "ret (implicit)"; fin(r); k.code.push_back(r);
  }
  int findreg(const std::string& n) { for (size_t i = scopes.size(); i--;) { auto it = scopes[i].find(n); if (it != scopes[i].end()) return it->second; } return -1; }
  std::string label(const std::string& n) { for (size_t i = lscopes.size(); i--;) { auto it = lscopes[i].find(n); if (it != lscopes[i].end()) return it->second; } return n; }
  void block() {
    scopes.push_back({}); lscopes.push_back({}); int id = scopeid++;
    { int d = 0; for (size_t q = p; q < tk.size(); ++q) { auto& s = tk[q].first; if (s == "{") d++; else if (s == "}") { if (d-- == 0) break; } else if (d == 0 && tk[q + 1].first == ":" && s != "?" ) lscopes.back()[s] = s + "#" + std::to_string(id); } }
    while (cur() != "}") {
      const std::string& c = cur();
      if (c == "") err("unexpected end");
      if (c == "{") { // either nested scope (vector operands never start a statement)
        p++; block(); continue; }
      if (c.rfind(".reg.", 0) == 0) { std::string ty = c.substr(4); int ln = tk[p].second; tk[p].first = ".reg"; tk.insert(tk.begin() + p + 1, {ty, ln}); for (auto& f : funcs) if (f.second.body > p) f.second.body++; fixup++; continue; }
      if (c == ".reg") { p++; std::string ty = next(); if (ty == ".v2" || ty == ".v4") ty = next();
        for (;;) { std::string n = next(); if (cur() == "<") { p++; int cnt = num(next()); expect(">"); for (int i = 0; i < cnt; ++i) scopes.back()[n + std::to_string(i)] = K->nreg++; } else scopes.back()[n] = K->nreg++;
          if (cur() == ",") { p++; continue; } expect(";"); break; } continue; }
      if (c == ".shared" || c == ".local" || c == ".global" || c == ".const") { var(K, K->syms); continue; }
      if (c == ".param") { tk[p].first = ".local"; size_t q = p; var(K, K->syms); tk[q].first = ".param"; continue; }
      if (c == ".loc") { p += 4; if (cur() == ",") { while (cur() == ",") { p++; while (cur() != "," && cur() != "" && cur()[0] != '@' && tk[p + 1].first != ":" && tk[p].second == tk[p - 1].second) p++; } } continue; }
      if (c == ".pragma" || c == ".branchtargets") { while (cur() != ";") p++; p++; continue; }
      if (c == ";") { p++; continue; }
      if (tk[p + 1].first == ":") { labels[label(c)] = K->code.size(); p += 2; continue; }
      inst();
    }
    p++; scopes.pop_back(); lscopes.pop_back();
  }
  Opnd operand() {
    Opnd o; std::string c = cur();
    if (c == "{") { p++; o.k = O_VEC; while (cur() != "}") { o.v.push_back(operand()); if (cur() == ",") p++; } p++; return o; }
    if (c == "[") { p++; o.k = O_MEM; std::string b = next(); int r = findreg(b); if (r >= 0) o.reg = r; else if (isdigit((u8)b[0])) o.off = num(b); else { auto it = K->syms.find(b); if (it == K->syms.end()) err("unknown symbol " + b); o.sym = b; o.symsp = it->second.sp; o.off = it->second.off == ~0ull ? 0 : it->second.off; }
      while (cur() == "+" || cur() == "-") { bool n = next() == "-"; if (cur() == "-") { p++; n = !n; } i64 v = (i64)num(next()); o.off += n ? -v : v; }
      if (cur() == ",") { // tensor coordinates: not supported
        err("tensor memory operand"); }
      expect("]"); return o; }
    if (c == "!") { p++; o = operand(); o.neg = true; return o; }
    if (c == "_") { p++; o.k = O_SINK; return o; }
    if (c == "-" || c == "+") { p++; o = operand(); if (c == "-") { o.imm = -o.imm; o.fval = -o.fval; if (o.flt) o.imm = pack(o.fval); } return o; }
    p++;
    int r = findreg(c);
    if (r >= 0) { o.k = O_REG; o.reg = r; if (cur() == "|") { p++; std::string q = next(); o.reg2 = q == "_" ? -1 : findreg(q); } return o; }
    auto sp = SPECS.find(c); if (sp != SPECS.end()) { o.k = O_SPEC; o.spec = sp->second; return o; }
    if (c == "WARP_SZ") { o.k = O_IMM; o.imm = 32; return o; }
    if (isdigit((u8)c[0])) { o.k = O_IMM;
      if (c.size() == 10 && c[0] == '0' && (c[1] == 'f' || c[1] == 'F')) { u32 u = strtoul(c.c_str() + 2, 0, 16); float f; memcpy(&f, &u, 4); o.fval = f; o.flt = true; o.imm = u; o.spec = 32; }
      else if (c.size() == 18 && c[0] == '0' && (c[1] == 'd' || c[1] == 'D')) { u64 u = strtoull(c.c_str() + 2, 0, 16); memcpy(&o.fval, &u, 8); o.flt = true; o.imm = u; o.spec = 64; }
      else if (c.find('.') != std::string::npos && c[1] != 'x') { o.fval = strtod(c.c_str(), 0); o.flt = true; o.imm = pack(o.fval); o.spec = 64; }
      else o.imm = num(c);
      return o; }
    auto it = K->syms.find(c);
    if (it != K->syms.end()) { o.k = O_SYM; o.sym = c; o.symsp = it->second.sp; o.off = it->second.off; if (cur() == "+") { p++; o.off += num(next()); } return o; }
    o.k = O_SYM; o.sym = label(c); o.symsp = -1; return o;
  }
  void inst() {
    Instr I; I.line = tk[p].second; size_t p0 = p;
    if (cur() == "@") { p++; if (cur() == "!") { I.gneg = true; p++; } I.g = findreg(next()); if (I.g < 0) { p--; err("unknown guard predicate"); } }
    std::string full = next(); size_t a = 0; std::vector<std::string> parts; for (size_t i = 0; i <= full.size(); ++i) if (i == full.size() || full[i] == '.') { parts.push_back(full.substr(a, i - a)); a = i + 1; }
    I.op = parts[0]; for (size_t i = 1; i < parts.size(); ++i) I.m.push_back(parts[i]);
    if (I.op == "call") { call(I); return; }
    if (I.op == "ret" && !retlabel.empty()) { p++; I.op = "bra"; I.text = "ret (inlined function)"; Opnd o; o.k = O_SYM; o.sym = retlabel.back(); I.o.push_back(o); fin(I); K->code.push_back(I); return; }
    while (cur() != ";") { I.o.push_back(operand()); if (cur() == "," ) p++; else if (cur() != ";") err("operand list"); }
    p++;
    for (size_t i = p0; i + 1 < p; ++i) { I.text += tk[i].first; if (tk[i].first == full) I.text += " "; }
    fin(I); K->code.push_back(I);
  }
  void fin(Instr& I);
};
enum Code { C_MOV, C_ADD, C_SUB, C_MUL, C_MAD, C_FMA, C_DIV, C_REM, C_ABS, C_NEG, C_MIN, C_MAX, C_AND, C_OR, C_XOR, C_NOT, C_SHL, C_SHR, C_SHF, C_LOP3, C_BFE, C_BFI, C_BFIND, C_BREV, C_CLZ, C_POPC, C_PRMT, C_SETP, C_SET, C_SELP, C_CVT, C_CVTA,
  C_LD, C_ST, C_ATOM, C_RED, C_BAR, C_SHFL, C_VOTE, C_ACTIVE, C_REDUX, C_EX2, C_LG2, C_RCP, C_SQRT, C_RSQRT, C_SIN, C_COS, C_TANH, C_BRA, C_RET, C_NOP, C_TRAP, C_CP, C_LDM, C_STM, C_MMA, C_WGMMA, C_CALL, C_COPYSIGN, C_TESTP, C_ELECT, C_MATCH, C_BMSK, C_ISSPACEP, C_SAD, C_DP4A, C_CNOT, C_WMMA, C_BAD };
static const std::map<std::string, int> CODES = {{"mov", C_MOV}, {"add", C_ADD}, {"sub", C_SUB}, {"mul", C_MUL}, {"mul24", C_MUL}, {"mad", C_MAD}, {"fma", C_FMA}, {"div", C_DIV}, {"rem", C_REM}, {"abs", C_ABS}, {"neg", C_NEG}, {"min", C_MIN}, {"max", C_MAX}, {"and", C_AND}, {"or", C_OR}, {"xor", C_XOR},
  {"not", C_NOT}, {"shl", C_SHL}, {"shr", C_SHR}, {"shf", C_SHF}, {"lop3", C_LOP3}, {"bfe", C_BFE}, {"bfi", C_BFI}, {"bfind", C_BFIND}, {"brev", C_BREV}, {"clz", C_CLZ}, {"popc", C_POPC}, {"prmt", C_PRMT}, {"setp", C_SETP}, {"set", C_SET}, {"selp", C_SELP}, {"cvt", C_CVT}, {"cvta", C_CVTA}, {"ld", C_LD}, {"ldu", C_LD},
  {"st", C_ST}, {"atom", C_ATOM}, {"red", C_RED}, {"bar", C_BAR}, {"barrier", C_BAR}, {"shfl", C_SHFL}, {"vote", C_VOTE}, {"activemask", C_ACTIVE}, {"redux", C_REDUX}, {"ex2", C_EX2}, {"lg2", C_LG2}, {"rcp", C_RCP}, {"sqrt", C_SQRT}, {"rsqrt", C_RSQRT}, {"sin", C_SIN}, {"cos", C_COS}, {"tanh", C_TANH}, {"bra", C_BRA},
  {"ret", C_RET}, {"exit", C_RET}, {"membar", C_NOP}, {"fence", C_NOP}, {"prefetch", C_NOP}, {"prefetchu", C_NOP}, {"nanosleep", C_NOP}, {"griddepcontrol", C_NOP}, {"setmaxnreg", C_NOP}, {"pmevent", C_NOP}, {"trap", C_TRAP}, {"brkpt", C_TRAP}, {"cp", C_CP}, {"ldmatrix", C_LDM}, {"stmatrix", C_STM}, {"mma", C_MMA}, {"wgmma", C_WGMMA}, {"call", C_CALL}, {"copysign", C_COPYSIGN}, {"testp", C_TESTP}, {"elect", C_ELECT}, {"match", C_MATCH}, {"bmsk", C_BMSK}, {"isspacep", C_ISSPACEP}, {"sad", C_SAD}, {"dp4a", C_DP4A}, {"cnot", C_CNOT}, {"wmma", C_WMMA}, {"applypriority", C_NOP}, {"discard", C_NOP}};
const int Parser::C_NOP_ = C_NOP;
void Parser::fin(Instr& I) {
  auto it = CODES.find(I.op); I.code = it == CODES.end() ? C_BAD : it->second;
  if (I.op == "createpolicy") { I.code = C_MOV; I.t = {B64}; I.o.resize(1); Opnd z; z.k = O_IMM; I.o.push_back(z); return; }
  for (auto& s : I.m) { auto t = TYS.find(s); if (t != TYS.end()) I.t.push_back(t->second); if (s == "ftz") I.ftz = true; if (s == "v2") I.vec = 2; if (s == "v4") I.vec = 4; if (s == "v8") I.vec = 8;
    if (s == "global") I.sp = GLOBAL; else if (s.rfind("shared", 0) == 0) I.sp = SHARED; else if (s == "local") I.sp = LOCAL; else if (s.rfind("param", 0) == 0) I.sp = PARAM; else if (s == "const") I.sp = CONSTS; }
  if (I.t.empty()) I.t.push_back(B32);
}
// ------------------------------------------------------------------ machine
struct Shadow { u32 w = 0, we = 0, r = 0, re = 0; u32 a = 0, wwe = 0, rwe = 0; };            // writer/reader id+1, epoch; ~0 = several
struct Region { u64 lo, hi; std::string name; bool ro; std::vector<Shadow> sh; };
struct Stats { u64 winst, tinst, mma, gld_req, gld_sec, gst_req, gst_sec, sh_req, sh_wave, bar, div, atom, cpasync, ldgb, stgb; };
struct Cfg { int bounds = 1, races = 1, uninit = 1, seed = 0, mma64 = 0; u64 maxinst = 2000000000ull; int warprace = 0, gridrace = 1; };
struct Machine {
  Cfg cfg; std::vector<Region> reg; Stats st{}; std::map<std::string, u64> hist; std::vector<std::string> warns; std::mt19937 rng; Region* last = nullptr;
  struct CpA { u64 dst, src; int n, sn; };
  struct Warp { int id; u32 wep = 1; u32 exist = 0, alive = 0, run = 0; u32 pc[32]; bool div = false; std::vector<std::array<u64, 32>> r; u32 barw = 0, syncw = 0; u32 barid[32]; std::vector<CpA> open[32]; std::vector<std::vector<CpA>> grp[32]; };
  std::vector<u8> smem, lmem; std::vector<Shadow> ssh; std::vector<u8> sval; u32 epoch = 0; u32 wsub = 0; std::vector<Warp> W; int nthreads = 0; Kernel* K = nullptr; std::vector<u8> par; u32 grid[3], blk[3], cta[3]; u64 dynoff = 0, dynsz = 0; u32 blin = 0; u64 icount = 0;
  struct Bar { int n = 0, want = 0; u64 insts = 0; } bars[17];
  Instr* ci = nullptr; Warp* cw = nullptr; int cl = 0; const u8* wv = nullptr; u64 benign = 0; u8 curb = 0, newb = 0; bool havev = false;
  std::string where() { char b[200]; snprintf(b, sizeof b, " [block (%u,%u,%u) warp %d lane %d, PTX line %d: ", cta[0], cta[1], cta[2], cw ? cw->id : -1, cl, ci ? ci->line : 0); return std::string(b) + (ci ? ci->text.substr(0, 140) : "") + "]"; }
  [[noreturn]] void fail(const std::string& m) { throw Err(m + where()); }
  u64 tid(int lane) { return cw->id * 32 + lane; }
  u64 spec(int s, int l) { u32 t = cw->id * 32 + l; switch (s) { case S_TIDX: return t % blk[0]; case S_TIDY: return t / blk[0] % blk[1]; case S_TIDZ: return t / (blk[0] * blk[1]); case S_NTIDX: return blk[0]; case S_NTIDY: return blk[1]; case S_NTIDZ: return blk[2]; case S_CTAX: return cta[0]; case S_CTAY: return cta[1]; case S_CTAZ: return cta[2];
      case S_NCTAX: return grid[0]; case S_NCTAY: return grid[1]; case S_NCTAZ: return grid[2]; case S_LANE: return l; case S_WARP: return cw->id; case S_NWARP: return W.size(); case S_CLOCK: return icount; case S_LMEQ: return 1u << l; case S_LMLT: return (1u << l) - 1; case S_LMLE: return (u32)((2ull << l) - 1); case S_LMGT: return (u32) ~((2ull << l) - 1); case S_LMGE: return ~((1u << l) - 1); case S_DYNS: return dynsz; case S_TOTS: return smem.size(); case S_ONE: return 1; default: return 0; } }
  u64 get(const Opnd& o, int l, Ty t) {
    switch (o.k) { case O_REG: { u64 v = cw->r[o.reg][l]; return o.neg ? !v : v; }
      case O_IMM: if (o.flt) { if (t == F32 || t == TF32 || (t == B32 && o.spec == 32)) return o.spec == 32 ? o.imm : pack((float)o.fval); if (t == F64 || t == B64) return pack(o.fval); if (t == F16) return f2h(o.fval); if (t == BF16) return f2bf(o.fval); return o.imm; } return o.imm;
      case O_SPEC: return spec(o.spec, l);
      case O_SYM: return symaddr(o); default: fail("bad source operand"); } }
  u64 symaddr(const Opnd& o) { if (o.symsp == SHARED) { auto& s = K->syms[o.sym]; return s.off == ~0ull ? dynoff + (o.off == -1 ? 0 : o.off + 1) : (u64)o.off; } if (o.symsp == GLOBAL || o.symsp == CONSTS) return o.off; if (o.symsp == LOCAL) return o.off; if (o.symsp == PARAM) return o.off; fail("unknown symbol " + o.sym); }
  void put(const Opnd& o, int l, u64 v) { if (o.k == O_REG) cw->r[o.reg][l] = v; else if (o.k != O_SINK) fail("bad destination"); }
  u64 ea(const Opnd& o, int l) { u64 b = o.reg >= 0 ? cw->r[o.reg][l] : 0; if (o.symsp == SHARED) { auto& s = K->syms[o.sym]; if (s.off == ~0ull) b += dynoff; } return b + o.off; }
  // resolve to host pointer with checks. kind: 0 read 1 write 2 atomic
  void race(Shadow& s, int kind, bool global, u64 a) {
    u32 me = global ? (blin << 10 | (u32)tid(cl)) + 1 : (u32)tid(cl) + 1; u32 e = epoch;
    auto conflict = [&](u32 o, u32 oe, u32 owe) { if (!o || o == me) return false; if (o == ~0u) return oe == e || (global && cfg.gridrace); u32 ob = (o - 1) >> 10, mb = (me - 1) >> 10; if (global && ob != mb) return (bool)cfg.gridrace; if (oe != e) return false; bool samewarp = ((o - 1) & 1023) / 32 == ((me - 1) & 1023) / 32; return !samewarp || (cfg.warprace && owe == cw->wep); };
    const char* nm = global ? "global" : "shared";
    char ab[64]; snprintf(ab, sizeof ab, " address 0x%lx", (unsigned long)a);
    if (kind == 1 && havev && curb == newb && conflict(s.w, s.we, s.wwe)) { benign++; }     // several warps storing the same value (compilers do this): counted, not an error
    else if (conflict(s.w, s.we, s.wwe) && kind != 2) fail(std::string("DATA RACE on ") + nm + " memory: " + (kind ? "write" : "read") + " conflicts with an unsynchronised write by thread " + std::to_string((s.w - 1) & 1023) + " of block " + std::to_string((s.w - 1) >> 10) + ab);
    if (kind == 2 && conflict(s.w, s.we, s.wwe)) fail(std::string("DATA RACE on ") + nm + " memory: atomic conflicts with a plain write" + ab);
    if (kind == 1 && conflict(s.r, s.re, s.rwe)) fail(std::string("DATA RACE on ") + nm + " memory: " + (kind == 2 ? "atomic" : "write") + " conflicts with an unsynchronised read" + ab);
    if (kind == 0 && conflict(s.a, e, ~0u)) { if (warns.size() < 20) warns.push_back(std::string("plain read of ") + nm + " memory that other threads update atomically" + where()); }   // CAS loops do this on purpose
    else if (kind == 1 && conflict(s.a, e, ~0u)) fail(std::string("DATA RACE on ") + nm + " memory: plain access conflicts with an atomic" + ab);
    if (kind == 1) { s.w = me; s.we = e; s.wwe = cw->wep; } else if (kind == 0) { s.rwe = cw->wep; if (s.r && s.re == e && s.r != me) { bool sw = !global && s.r != ~0u && ((s.r - 1) / 32 == (me - 1) / 32); if (!sw) { if (global && s.r != ~0u && ((s.r - 1) >> 10) == ((me - 1) >> 10)) s.r = me; else s.r = ~0u; } } else { s.r = s.r && global && s.r != me && ((s.r - 1) >> 10) != ((me - 1) >> 10) ? ~0u : me; s.re = e; } } else s.a = me;
  }
  u8* ptr(Space sp, u64 a, int n, int kind) {
    if (sp == GEN) { if (a >= SHB && a < SHB + (1ull << 32)) { sp = SHARED; a -= SHB; } else if (a >= LCB && a < LCB + (1ull << 32)) { sp = LOCAL; a -= LCB; } else sp = GLOBAL; }
    if (a % n) fail("misaligned " + std::to_string(n) + "-byte access");
    if (sp == SHARED) { a &= 0xffffffffu; if (a + n > smem.size()) fail("shared memory access out of bounds: offset " + std::to_string(a) + " of " + std::to_string(smem.size()));
      if (kind == 0 && cfg.uninit) for (int i = 0; i < n; ++i) if (!sval[a + i]) fail(sval[a + i] == 0 ? "read of uninitialised shared memory, offset " + std::to_string(a + i) : "");
      if (kind == 0 && cfg.uninit) for (int i = 0; i < n; ++i) if (sval[a + i] == 2) fail("read of shared memory with a cp.async still in flight, offset " + std::to_string(a + i));
      if (kind) for (int i = 0; i < n; ++i) sval[a + i] = 1;
      if (cfg.races) for (int i = 0; i < n; ++i) { if ((havev = wv && kind == 1)) { curb = smem[a + i]; newb = wv[i]; } race(ssh[a + i], kind, false, a + i); }
      return smem.data() + a; }
    if (sp == LOCAL) { u64 per = (K->local + 15) / 16 * 16; if (a + n > per) fail("local memory out of bounds"); return lmem.data() + (tid(cl)) * per + a; }
    if (sp == PARAM) { if (a + n > par.size()) fail("param out of bounds"); return par.data() + a; }
    if (cfg.bounds) {
      Region* R = nullptr; if (last && a >= last->lo && a + n <= last->hi) R = last; else for (auto& x : reg) if (a >= x.lo && a + n <= x.hi) { R = &x; break; }
      if (!R) { std::string best; u64 bd = ~0ull; for (auto& x : reg) { u64 d = a < x.lo ? x.lo - a : a >= x.hi ? a - x.hi + 1 : 0; if (d < bd) { bd = d; best = x.name + (a < x.lo ? " - " : " + ") + std::to_string(a < x.lo ? x.lo - a : a - x.lo) + " (size " + std::to_string(x.hi - x.lo) + ")"; } }
        fail(std::string("global memory ") + (kind ? "write" : "read") + " out of bounds: nearest " + best); }
      last = R; if (kind && R->ro) fail("write to read-only buffer " + R->name);
      if (cfg.races && !(R->ro)) { if (R->sh.empty()) R->sh.resize(R->hi - R->lo); for (int i = 0; i < n; ++i) { if ((havev = wv && kind == 1)) { curb = ((u8*)a)[i]; newb = wv[i]; } race(R->sh[a - R->lo + i], kind, true, a - R->lo + i); } } }
    return (u8*)a; }
  static u64 ldn(const u8* p, int n) { u64 v = 0; memcpy(&v, p, n); return v; }
  static i64 sx(u64 v, Ty t) { switch (tysz(t)) { case 1: return (int8_t)v; case 2: return (int16_t)v; case 4: return (i32)v; default: return (i64)v; } }
  static u64 zx(u64 v, Ty t) { switch (tysz(t)) { case 1: return (u8)v; case 2: return (u16)v; case 4: return (u32)v; default: return v; } }
  static float fz(float f, bool z) { return z && std::fpclassify(f) == FP_SUBNORMAL ? copysignf(0.f, f) : f; }
  // ---------------- global-memory coalescing + bank conflicts
  void coalesce(u64* a, u32 m, int n, bool store) { std::set<u64> s; int c = 0; for (int l = 0; l < 32; ++l) if (m >> l & 1) { c++; for (u64 x = a[l] / 32; x <= (a[l] + n - 1) / 32; ++x) s.insert(x); } if (!c) return; if (store) { st.gst_req++; st.gst_sec += s.size(); st.stgb += (u64)c * n; } else { st.gld_req++; st.gld_sec += s.size(); st.ldgb += (u64)c * n; } }
  void banks(u64* a, u32 m, int n) { if (!m) return; int groups = n <= 4 ? 1 : n == 8 ? 2 : 4, per = 32 / groups; st.sh_req++; for (int g = 0; g < groups; ++g) { std::map<int, std::set<u64>> b; for (int l = g * per; l < (g + 1) * per; ++l) if (m >> l & 1) for (int k = 0; k < std::max(1, n / 4); ++k) { u64 w = (a[l] & 0xffffffffu) / 4 + k; b[w % 32].insert(w); } size_t mx = 0; for (auto& x : b) mx = std::max(mx, x.second.size()); st.sh_wave += mx; } }
  void step(Warp& w);
  void run(Kernel& k, const u32* g, const u32* b, u64 dyn, void** args);
  void arith(Instr& I, u32 m); void cvt(Instr& I, u32 m); void memop(Instr& I, u32 m); void atomic(Instr& I, u32 m); void mma(Instr& I); void wgmma(Instr& I, u32 m); void wmma(Instr& I); void cp(Instr& I, u32 m); void setp(Instr& I, u32 m);
  std::vector<std::array<u32, 32>> wg_d; 
};
#define LANES(m) for (int l = 0; l < 32; ++l) if ((m) >> l & 1)
static bool cmpf(const std::string& c, double a, double b) { bool un = a != a || b != b; if (c == "eq") return !un && a == b; if (c == "ne") return !un && a != b; if (c == "lt") return !un && a < b; if (c == "le") return !un && a <= b; if (c == "gt") return !un && a > b; if (c == "ge") return !un && a >= b;
  if (c == "equ") return un || a == b; if (c == "neu") return un || a != b; if (c == "ltu") return un || a < b; if (c == "leu") return un || a <= b; if (c == "gtu") return un || a > b; if (c == "geu") return un || a >= b; if (c == "num") return !un; if (c == "nan") return un; throw Err("cmp " + c); }
static bool cmpi(const std::string& c, u64 a, u64 b, bool s) { if (c == "eq") return a == b; if (c == "ne") return a != b; if (c == "lo") return a < b; if (c == "ls") return a <= b; if (c == "hi") return a > b; if (c == "hs") return a >= b; if (s) { i64 x = a, y = b; if (c == "lt") return x < y; if (c == "le") return x <= y; if (c == "gt") return x > y; if (c == "ge") return x >= y; } else { if (c == "lt") return a < b; if (c == "le") return a <= b; if (c == "gt") return a > b; if (c == "ge") return a >= b; } throw Err("cmp " + c); }
static double tof(u64 v, Ty t) { switch (t) { case F32: case TF32: return bits<float>(v); case F64: return bits<double>(v); case F16: return h2f(v); case BF16: return bf2f(v); default: throw Err("tof"); } }
void Machine::setp(Instr& I, u32 m) {
  Ty t = I.t.back(); if (I.code == C_SET) t = I.t[1]; bool s = issigned(t), f = isfloat(t); const std::string& c = I.m[0]; std::string bop; for (auto& x : I.m) if (x == "and" || x == "or" || x == "xor") bop = x;
  if (t == F16X2 || t == BF16X2) { Ty e = t == F16X2 ? F16 : BF16; LANES(m) { cl = l; u32 a = get(I.o[1], l, B32), b = get(I.o[2], l, B32), r = 0; bool q[2]; for (int h = 0; h < 2; ++h) { q[h] = cmpf(c, tof((u16)(a >> 16 * h), e), tof((u16)(b >> 16 * h), e)); if (q[h]) r |= (I.t[0] == F16X2 ? 0x3C00u : I.t[0] == BF16X2 ? 0x3F80u : 0xFFFFu) << 16 * h; } if (I.code == C_SETP) { put(I.o[0], l, q[0]); if (I.o[0].reg2 >= 0) cw->r[I.o[0].reg2][l] = q[1]; } else put(I.o[0], l, r); } return; }
  for (int l = 0; l < 32; ++l) if (m >> l & 1) { cl = l; u64 a = get(I.o[1], l, t), b = get(I.o[2], l, t); bool r;
    if (f) { double x = tof(a, t), y = tof(b, t); if (I.ftz && t == F32) { x = fz(x, true); y = fz(y, true); } r = cmpf(c, x, y); } else r = s ? cmpi(c, sx(a, t), sx(b, t), true) : cmpi(c, zx(a, t), zx(b, t), false);
    bool q = !r; if (!bop.empty()) { bool z = get(I.o[3], l, PRED); if (bop == "and") { r = r && z; q = q && z; } else if (bop == "or") { r = r || z; q = q || z; } else { r = r != z; q = q != z; } }
    if (I.code == C_SET) put(I.o[0], l, isfloat(I.t[0]) ? (r ? 0x3f800000u : 0) : (r ? zx(~0ull, I.t[0]) : 0));
    else { put(I.o[0], l, r); if (I.o[0].reg2 >= 0) cw->r[I.o[0].reg2][l] = q; } }
}
void Machine::cvt(Instr& I, u32 m) {
  bool sat = I.has("sat"), relu = I.has("relu"); Ty d = I.t[0], s = I.t.size() > 1 ? I.t[1] : I.t[0];
  std::string rnd; for (auto& x : I.m) if (x == "rn" || x == "rz" || x == "rm" || x == "rp" || x == "rni" || x == "rzi" || x == "rmi" || x == "rpi" || x == "rna") rnd = x;
  auto toh = [&](float f) -> u16 { if (relu && !(f > 0)) f = f != f ? f : 0; if (rnd == "rz") { u16 h = f2h(f); float b = h2f(h); if (std::isfinite(f) && fabsf(b) > fabsf(f)) h--; return h; } return f2h(f); };
  auto tob = [&](float f) -> u16 { if (relu && !(f > 0)) f = f != f ? f : 0; if (rnd == "rz") { u32 u = bits<u32>(pack(f)); return f != f ? 0x7fff : u >> 16; } return f2bf(f); };
  for (int l = 0; l < 32; ++l) if (m >> l & 1) { cl = l;
    if (d == F16X2 || d == BF16X2) { if (I.o.size() < 3) fail("packed cvt form"); float a = bits<float>(get(I.o[1], l, F32)), b = bits<float>(get(I.o[2], l, F32)); u32 hi = d == F16X2 ? toh(a) : tob(a), lo = d == F16X2 ? toh(b) : tob(b); put(I.o[0], l, hi << 16 | lo); continue; }
    u64 v = get(I.o[1], l, s);
    if (d == TF32) { u32 u = (u32)v; if (rnd == "rna") u = (u + 0x1000) & 0xffffe000u; else { u32 r = (u >> 13) & 1; u = (u + 0xfff + r) & 0xffffe000u; } put(I.o[0], l, u); continue; }
    if (isfloat(s)) { double x = tof(v, s); if (I.ftz && s == F32) x = fz(x, true);
      if (isfloat(d)) { if (rnd == "rni") x = nearbyint(x); else if (rnd == "rzi") x = trunc(x); else if (rnd == "rmi") x = floor(x); else if (rnd == "rpi") x = ceil(x); if (sat) x = x != x ? 0 : std::min(1.0, std::max(0.0, x));
        switch (d) { case F32: { float f = (float)x; if (rnd == "rz" && fabs((double)f) > fabs(x)) f = nextafterf(f, 0); put(I.o[0], l, pack(fz(f, I.ftz))); break; } case F64: put(I.o[0], l, pack(x)); break; case F16: put(I.o[0], l, toh(x)); break; case BF16: put(I.o[0], l, tob(x)); break; default: fail("cvt dst"); } }
      else { if (rnd == "rni") x = nearbyint(x); else if (rnd == "rmi") x = floor(x); else if (rnd == "rpi") x = ceil(x); else x = trunc(x); u64 r; if (x != x) r = tysz(d) == 8 ? 0x8000000000000000ull : 0; else if (issigned(d)) { double lo = -ldexp(1, tysz(d) * 8 - 1), hi = ldexp(1, tysz(d) * 8 - 1); r = x <= lo ? (u64)(i64)lo : x >= hi ? (u64)((1ull << (tysz(d) * 8 - 1)) - 1) : (u64)(i64)x; } else { double hi = ldexp(1, tysz(d) * 8); r = x <= 0 ? 0 : x >= hi ? zx(~0ull, d) : (u64)x; }
        put(I.o[0], l, zx(r, tysz(d) < 4 && issigned(d) ? S32 : d)); } }
    else { i64 sv = sx(v, s); u64 uv = zx(v, s);
      if (isfloat(d)) { double x = issigned(s) ? (double)sv : (double)uv; float f = issigned(s) ? (float)sv : (float)uv; if (d == F32 && rnd == "rz" && fabs((double)f) > fabs(x)) f = nextafterf(f, 0); if (d == F32) put(I.o[0], l, pack(f)); else if (d == F64) put(I.o[0], l, pack(x)); else if (d == F16) put(I.o[0], l, toh(f)); else if (d == BF16) put(I.o[0], l, tob(f)); else fail("cvt"); }
      else { u64 r = issigned(s) ? (u64)sv : uv; if (sat) { int bn = tysz(d) * 8; if (issigned(d)) { i64 lo = -(1ll << (bn - 1)), hi = (1ll << (bn - 1)) - 1; if (issigned(s)) r = std::min(std::max(sv, lo), hi); else r = uv > (u64)hi ? hi : uv; } else { if (issigned(s) && sv < 0) r = 0; else if (bn < 64 && r > zx(~0ull, d)) r = zx(~0ull, d); } } 
        put(I.o[0], l, tysz(d) >= 4 ? zx(r, d) : issigned(d) ? (u32)sx(r, d) : zx(r, d)); } } }
}
void Machine::arith(Instr& I, u32 m) {
  Ty t = I.t[0]; const auto& o = I.o; int c = I.code; bool hi = I.has("hi"), wide = I.has("wide"), sat = I.has("sat"), nanp = I.has("NaN"), relu = I.has("relu");
  auto f1 = [&](float a, float b, float d) -> float { float r; switch (c) { case C_ADD: r = a + b; break; case C_SUB: r = a - b; break; case C_MUL: r = a * b; break; case C_MAD: case C_FMA: r = fmaf(a, b, d); break; case C_DIV: r = a / b; break; case C_ABS: r = fabsf(a); break; case C_NEG: r = -a; break;
      case C_MIN: r = nanp && (a != a || b != b) ? NAN : fminf(a, b); break; case C_MAX: r = nanp && (a != a || b != b) ? NAN : fmaxf(a, b); break; default: fail("f op"); } if (sat) r = r != r ? 0 : std::min(1.f, std::max(0.f, r)); if (relu && r < 0) r = 0; return r; };
  size_t ns = o.size() - 1;
  if (t == F32) { bool z = I.ftz; for (int l = 0; l < 32; ++l) if (m >> l & 1) { cl = l; float a = fz(bits<float>(get(o[1], l, t)), z), b = ns > 1 ? fz(bits<float>(get(o[2], l, t)), z) : 0, d = ns > 2 ? fz(bits<float>(get(o[3], l, t)), z) : 0; put(o[0], l, pack(fz(f1(a, b, d), z))); } return; }
  if (t == F64) { LANES(m) { cl = l; double a = bits<double>(get(o[1], l, t)), b = ns > 1 ? bits<double>(get(o[2], l, t)) : 0, d = ns > 2 ? bits<double>(get(o[3], l, t)) : 0, r; switch (c) { case C_ADD: r = a + b; break; case C_SUB: r = a - b; break; case C_MUL: r = a * b; break; case C_MAD: case C_FMA: r = fma(a, b, d); break; case C_DIV: r = a / b; break; case C_ABS: r = fabs(a); break; case C_NEG: r = -a; break; case C_MIN: r = fmin(a, b); break; case C_MAX: r = fmax(a, b); break; default: fail("d op"); } put(o[0], l, pack(r)); } return; }
  if (t == F32X2) { LANES(m) { cl = l; u64 a = get(o[1], l, B64), b = ns > 1 ? get(o[2], l, B64) : 0, d = ns > 2 ? get(o[3], l, B64) : 0, r = 0; for (int h = 0; h < 2; ++h) r |= (u64)bits<u32>(pack(f1(bits<float>(a >> 32 * h & 0xffffffffu), bits<float>(b >> 32 * h & 0xffffffffu), bits<float>(d >> 32 * h & 0xffffffffu)))) << 32 * h; put(o[0], l, r); } return; }
  if (t == F16 || t == BF16 || t == F16X2 || t == BF16X2) { bool x2 = t == F16X2 || t == BF16X2, b16 = t == BF16 || t == BF16X2; Ty e = b16 ? BF16 : F16;
    LANES(m) { cl = l; u64 a = get(o[1], l, x2 ? B32 : e), b = ns > 1 ? get(o[2], l, x2 ? B32 : e) : 0, d = ns > 2 ? get(o[3], l, x2 ? B32 : e) : 0, r = 0; for (int h = 0; h < (x2 ? 2 : 1); ++h) { u16 A = a >> 16 * h, B = b >> 16 * h, D = d >> 16 * h; 
        double q; if (c == C_FMA || c == C_MAD) q = (double)tof(A, e) * tof(B, e) + tof(D, e); else q = f1(tof(A, e), tof(B, e), 0); if (relu && q < 0) q = 0; r |= (u64)(b16 ? f2bf((float)q) : f2h((float)q)) << 16 * h; } put(o[0], l, r); } return; }
  bool s = issigned(t); int bn = tysz(t) * 8;
  for (int l = 0; l < 32; ++l) if (m >> l & 1) { cl = l;
    u64 a = get(o[1], l, t), b = ns > 1 ? get(o[2], l, t) : 0, r = 0; i64 sa = sx(a, t), sb = sx(b, t); u64 ua = zx(a, t), ub = zx(b, t);
    switch (c) { case C_ADD: r = ua + ub; if (sat) r = std::min<i64>(std::max<i64>(sa + sb, INT32_MIN), INT32_MAX); break; case C_SUB: r = ua - ub; if (sat) r = std::min<i64>(std::max<i64>(sa - sb, INT32_MIN), INT32_MAX); break;
      case C_MUL: case C_MAD: { __int128 pr = s ? (__int128)sa * sb : (__int128)((unsigned __int128)ua * ub); r = hi ? (u64)(pr >> bn) : (u64)pr; if (c == C_MAD) r += get(o[3], l, wide ? (s ? S64 : U64) : t); if (wide) { Ty wt = bn == 16 ? U32 : U64; put(o[0], l, zx(r, wt)); continue; } break; }
      case C_DIV: if (!ub) { r = ~0ull; break; } r = s ? (u64)(sb == -1 ? -sa : sa / sb) : ua / ub; break; case C_REM: if (!ub) { r = ua; break; } r = s ? (u64)(sb == -1 ? 0 : sa % sb) : ua % ub; break;
      case C_ABS: r = sa < 0 ? -sa : sa; break; case C_NEG: r = -sa; break; case C_MIN: r = s ? (u64)std::min(sa, sb) : std::min(ua, ub); if (relu && (i64)r < 0) r = 0; break; case C_MAX: r = s ? (u64)std::max(sa, sb) : std::max(ua, ub); break;
      case C_SAD: r = (s ? (u64)llabs(sa - sb) : (ua > ub ? ua - ub : ub - ua)) + get(o[3], l, t); break; default: fail("int op"); }
    put(o[0], l, zx(r, t)); }
}
void Machine::memop(Instr& I, u32 m) {
  Ty t = I.t.back(); int n = tysz(t), tot = n * I.vec; bool ld = I.code == C_LD; const Opnd& mo = ld ? I.o[1] : I.o[0]; const Opnd& vo = ld ? I.o[0] : I.o[1]; Space sp = I.sp; if (sp == CONSTS) sp = GLOBAL; if (sp == PARAM && mo.symsp == LOCAL) sp = LOCAL;
  u64 a[32]; LANES(m) a[l] = ea(mo, l);
  if (sp == GLOBAL || (sp == GEN && m && !(a[__builtin_ctz(m)] >= SHB))) coalesce(a, m, tot, !ld); else if (sp == SHARED) banks(a, m, tot);
  if (!ld && cfg.races && (sp == SHARED || sp == GLOBAL)) { // two lanes of one store hitting the same address with different values
    std::unordered_map<u64, int> seen; LANES(m) { auto it = seen.find(a[l]); if (it == seen.end()) seen[a[l]] = l; else { cl = l; for (int k = 0; k < I.vec; ++k) { const Opnd& q = I.vec > 1 ? vo.v[k] : vo; if (zx(get(q, l, t), t) != zx(get(q, it->second, t), t)) fail("DATA RACE: lanes " + std::to_string(it->second) + " and " + std::to_string(l) + " of one store write different values to the same address"); } } } }
  for (int l = 0; l < 32; ++l) if (m >> l & 1) { cl = l; u8 buf[64]; if (!ld && cfg.races) { for (int k = 0; k < I.vec; ++k) { u64 v = get(vo.k == O_VEC ? vo.v[k] : vo, l, t); memcpy(buf + k * n, &v, n); } wv = buf; } u8* q = ptr(sp, a[l], tot, ld ? 0 : 1); wv = nullptr;
    for (int k = 0; k < I.vec; ++k) { const Opnd& e = vo.k == O_VEC ? vo.v[k] : vo; if (ld) { if (e.k == O_SINK) continue; if (n == 16) fail("b128"); u64 v = ldn(q + k * n, n); if (issigned(t)) v = n < 8 ? (u64)(n < 4 ? (u32)sx(v, t) : (u32)v) : v; put(e, l, v); } else { u64 v = get(e, l, t); memcpy(q + k * n, &v, n); } } }
}
void Machine::atomic(Instr& I, u32 m) {
  bool red = I.code == C_RED; const Opnd& mo = red ? I.o[0] : I.o[1]; const Opnd* vo = &I.o[red ? 1 : 2]; Ty t = I.t.back(); int n = tysz(t); std::string op; for (auto& x : I.m) if (x == "add" || x == "min" || x == "max" || x == "and" || x == "or" || x == "xor" || x == "exch" || x == "cas" || x == "inc" || x == "dec") op = x; 
  if (I.m.size() > 1 && I.m[0] == "async") fail("red.async");
  u64 a[32]; LANES(m) a[l] = ea(mo, l); st.atom++;
  LANES(m) { cl = l; u8* q = ptr(I.sp, a[l], n * I.vec, 2);
    for (int k = 0; k < I.vec; ++k) { const Opnd& e = I.vec > 1 ? vo->v[k] : *vo; u64 old = ldn(q + k * n, n), v = get(e, l, t), r;
      auto fop = [&](float x, float y) { return op == "add" ? x + y : op == "min" ? fminf(x, y) : op == "max" ? fmaxf(x, y) : NAN; };
      if (op == "exch") r = v; else if (op == "cas") { u64 nv = get(I.o[3], l, t); r = zx(old, t) == zx(v, t) ? nv : old; }
      else if (t == F32) r = pack(fop(bits<float>(old), bits<float>(v))); else if (t == F64) r = pack(bits<double>(old) + bits<double>(v)); else if (t == F16) r = f2h(fop(h2f(old), h2f(v))); else if (t == BF16) r = f2bf(fop(bf2f(old), bf2f(v)));
      else if (t == F16X2) r = (u32)f2h(fop(h2f(old), h2f(v))) | (u32)f2h(fop(h2f(old >> 16), h2f(v >> 16))) << 16; else if (t == BF16X2) r = (u32)f2bf(fop(bf2f(old), bf2f(v))) | (u32)f2bf(fop(bf2f(old >> 16), bf2f(v >> 16))) << 16;
      else if (op == "add") r = old + v; else if (op == "and") r = old & v; else if (op == "or") r = old | v; else if (op == "xor") r = old ^ v; else if (op == "min") r = issigned(t) ? (u64)std::min(sx(old, t), sx(v, t)) : std::min(zx(old, t), zx(v, t)); else if (op == "max") r = issigned(t) ? (u64)std::max(sx(old, t), sx(v, t)) : std::max(zx(old, t), zx(v, t));
      else if (op == "inc") r = zx(old, t) >= zx(v, t) ? 0 : old + 1; else if (op == "dec") r = zx(old, t) == 0 || zx(old, t) > zx(v, t) ? v : old - 1; else fail("atomic op");
      memcpy(q + k * n, &r, n); if (!red) { const Opnd& d = I.vec > 1 ? I.o[0].v[k] : I.o[0]; put(d, l, zx(old, t)); } } }
}
void Machine::cp(Instr& I, u32 m) {
  if (I.m[0] != "async") fail("cp variant");
  if (I.m[1] == "commit_group") { LANES(m) { cw->grp[l].push_back(cw->open[l]); cw->open[l].clear(); } return; }
  if (I.m[1] == "wait_group" || I.m[1] == "wait_all") { size_t keep = I.m[1] == "wait_all" ? 0 : I.o[0].imm; LANES(m) { cl = l; auto& g = cw->grp[l]; if (I.m[1] == "wait_all" && !cw->open[l].empty()) { g.push_back(cw->open[l]); cw->open[l].clear(); }
      while (g.size() > keep) { for (auto& c : g.front()) { u8* d = ptr(SHARED, c.dst, c.n, 1); memset(d, 0, c.n); if (c.sn) memcpy(d, (u8*)c.src, c.sn); } g.erase(g.begin()); } } return; }
  if (I.m[1] == "bulk" || I.m[1] == "mbarrier") fail("cp.async." + I.m[1] + " (TMA/mbarrier) not supported");
  int n = I.o[2].imm; u64 a[32], b[32]; u32 rd = 0; LANES(m) { a[l] = ea(I.o[0], l); b[l] = ea(I.o[1], l); int sn = n; if (I.o.size() > 3) { const Opnd& q = I.o[3]; sn = (int)std::min<u64>(n, zx(get(q, l, U32), U32)); if (!I.has("L2::cache_hint") || I.o.size() > 4 || true) {} }
    cl = l; if (sn > 0) { rd |= 1u << l; ptr(GLOBAL, b[l], n, 0); if (sn < n) {} }
    u8* d = ptr(SHARED, a[l], n, 1); memset(d, 0xFF, n); for (int i = 0; i < n; ++i) sval[(a[l] & 0xffffffffu) + i] = 2; cw->open[l].push_back({a[l], b[l], n, sn}); }
  coalesce(b, rd, n, false); banks(a, m, n); st.cpasync++;
}
void Machine::mma(Instr& I) {
  st.mma++; Ty ta = T_NONE, tacc = I.t[0]; ta = I.t.size() > 1 ? I.t[1] : F16; std::string sh; for (auto& x : I.m) if (x[0] == 'm' && x.size() > 4 && isdigit((u8)x[1])) sh = x; int k = atoi(sh.c_str() + sh.find('k') + 1);
  if (sh.rfind("m16n8k", 0) != 0) fail("mma shape " + sh); if (!(ta == F16 || ta == BF16 || ta == TF32)) fail("mma type"); auto& A = I.o[1].v; auto& B = I.o[2].v; auto& C = I.o[3].v; auto& D = I.o[0].v; float a[16][16], b[16][8], c[16][8]; bool t32 = ta == TF32;
  for (int l = 0; l < 32; ++l) { int g = l >> 2, q = l & 3;
    if (t32) { for (int i = 0; i < (int)A.size(); ++i) { u32 u = (u32)get(A[i], l, B32) & 0xffffe000u; a[i & 1 ? g + 8 : g][q + (i >> 1) * 4] = bits<float>(u); } for (int i = 0; i < (int)B.size(); ++i) b[q + i * 4][g] = bits<float>((u32)get(B[i], l, B32) & 0xffffe000u); }
    else { int na = A.size() * 2, nb = B.size() * 2; for (int i = 0; i < na; ++i) { int row = (i >> 1) & 1 ? g + 8 : g, col = q * 2 + (i & 1) + (i >= 4 ? 8 : 0); u16 h = get(A[i >> 1], l, B32) >> 16 * (i & 1); a[row][col] = ta == F16 ? h2f(h) : bf2f(h); }
      for (int i = 0; i < nb; ++i) { int row = q * 2 + (i & 1) + (i >= 2 ? 8 : 0); u16 h = get(B[i >> 1], l, B32) >> 16 * (i & 1); b[row][g] = ta == F16 ? h2f(h) : bf2f(h); } }
    if (tacc == F32) for (int i = 0; i < 4; ++i) c[i < 2 ? g : g + 8][q * 2 + (i & 1)] = bits<float>(get(C[i], l, F32)); else for (int i = 0; i < 4; ++i) c[i < 2 ? g : g + 8][q * 2 + (i & 1)] = h2f(get(C[i >> 1], l, B32) >> 16 * (i & 1)); }
  float d[16][8]; for (int i = 0; i < 16; ++i) for (int j = 0; j < 8; ++j) { if (cfg.mma64) { double s = c[i][j]; for (int x = 0; x < k; ++x) s += (double)a[i][x] * b[x][j]; d[i][j] = (float)s; } else { float s = c[i][j]; for (int x = 0; x < k; ++x) s += a[i][x] * b[x][j]; d[i][j] = s; } }
  for (int l = 0; l < 32; ++l) { int g = l >> 2, q = l & 3; if (tacc == F32) for (int i = 0; i < 4; ++i) put(D[i], l, pack(d[i < 2 ? g : g + 8][q * 2 + (i & 1)])); else for (int i = 0; i < 2; ++i) put(D[i], l, (u32)f2h(d[i ? g + 8 : g][q * 2]) | (u32)f2h(d[i ? g + 8 : g][q * 2 + 1]) << 16); }
}
// wgmma.mma_async: executed eagerly, one warp (16 rows of the 64) at a time. A from registers or descriptor, B from descriptor.
void Machine::wgmma(Instr& I, u32 m) {
  (void)m; if (I.m[0] == "fence" || I.m[0] == "commit_group" || I.m[0] == "wait_group") return;
  if (I.m[0] != "mma_async") fail("wgmma variant");
  st.mma++; std::string sh; for (auto& x : I.m) if (x[0] == 'm' && x.rfind("m64n", 0) == 0) sh = x; int N = atoi(sh.c_str() + 4), Kk = atoi(sh.c_str() + sh.find('k') + 1); Ty tacc = I.t[0], ta = I.t[1]; if (tacc != F32 || !(ta == F16 || ta == BF16 || ta == TF32)) fail("wgmma type"); int es = ta == TF32 ? 4 : 2;
  auto& D = I.o[0].v; bool areg = I.o[1].k == O_VEC; int wr = cw->id % 4; u64 scaled = get(I.o[3], 0, PRED); auto im = [&](size_t i) -> i64 { return i < I.o.size() ? (i64)(i32)I.o[i].imm : 0; }; int sa = im(4), sb = im(5); int tA = areg ? 0 : im(6), tB = im(areg ? 6 : 7);
  auto val = [&](u64 raw) -> float { return ta == TF32 ? bits<float>(raw & 0xffffe000u) : ta == F16 ? h2f(raw) : bf2f(raw); };
  // element (mn, k) of an operand described by a matrix descriptor
  auto elem = [&](u64 d, int mn, int kk, bool trans) -> float {
    u64 start = (d & 0x3fff) << 4, lbo = (d >> 16 & 0x3fff) << 4, sbo = (d >> 32 & 0x3fff) << 4; int sw = d >> 62; int swb = sw == 0 ? 16 : sw == 1 ? 128 : sw == 2 ? 64 : 32; u64 off;
    if (!trans) { u64 kb = (u64)kk * es; if (sw == 0) off = (mn / 8) * sbo + (mn % 8) * 16 + (kb / 16) * lbo + kb % 16; else off = (mn / 8) * sbo + (mn % 8) * swb + kb; }
    else { int per = swb / es; u64 mb = (u64)(mn % per) * es; if (sw == 0) off = (mn / per) * sbo + (kk / 8) * lbo + (kk % 8) * 16 + mb; else off = (mn / per) * lbo + (kk / 8) * sbo + (kk % 8) * swb + mb; }
    u64 ad = start + off; if (sw == 1) ad ^= (ad >> 7 & 7) << 4; else if (sw == 2) ad ^= (ad >> 7 & 3) << 4; else if (sw == 3) ad ^= (ad >> 7 & 1) << 4;
    ad &= 0x3ffff; cl = 0; u8* q = ptr(SHARED, ad, es, 0); return val(ldn(q, es)); };
  float a[16][32]; std::vector<float> b((size_t)Kk * N);
  if (areg) for (int l = 0; l < 32; ++l) { int g = l >> 2, q = l & 3; auto& A = I.o[1].v; if (es == 2) for (int i = 0; i < 8; ++i) a[(i >> 1) & 1 ? g + 8 : g][q * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = val((u16)(get(A[i >> 1], l, B32) >> 16 * (i & 1))); else for (int i = 0; i < 4; ++i) a[i & 1 ? g + 8 : g][q + (i >> 1) * 4] = val((u32)get(A[i], l, B32)); }
  else { u64 d = get(I.o[1], 0, B64); for (int i = 0; i < 16; ++i) for (int x = 0; x < Kk; ++x) a[i][x] = elem(d, wr * 16 + i, x, tA); }
  u64 db = get(I.o[2], 0, B64); for (int x = 0; x < Kk; ++x) for (int j = 0; j < N; ++j) b[(size_t)x * N + j] = elem(db, j, x, tB);
  std::vector<float> c((size_t)16 * N); for (int l = 0; l < 32; ++l) { int g = l >> 2, q = l & 3; for (int j = 0; j < N / 8; ++j) for (int i = 0; i < 4; ++i) c[(size_t)(i < 2 ? g : g + 8) * N + j * 8 + q * 2 + (i & 1)] = scaled ? bits<float>(get(D[j * 4 + i], l, F32)) : 0; }
  for (int i = 0; i < 16; ++i) for (int x = 0; x < Kk; ++x) { float av = a[i][x] * sa * sb; for (int j = 0; j < N; ++j) c[(size_t)i * N + j] += av * b[(size_t)x * N + j]; }
  for (int l = 0; l < 32; ++l) { int g = l >> 2, q = l & 3; for (int j = 0; j < N / 8; ++j) for (int i = 0; i < 4; ++i) put(D[j * 4 + i], l, pack(c[(size_t)(i < 2 ? g : g + 8) * N + j * 8 + q * 2 + (i & 1)])); }
}
// wmma fragments are opaque, so any consistent element <-> (lane, register) map will do: linear, row-major
void Machine::wmma(Instr& I) {
  std::string sh; for (auto& x : I.m) if (x.rfind("m", 0) == 0 && x.find('n') != std::string::npos && x.find('k') != std::string::npos && isdigit((u8)x[1])) sh = x; int M = atoi(sh.c_str() + 1), N = atoi(sh.c_str() + sh.find('n') + 1), Kk = atoi(sh.c_str() + sh.find('k') + 1);
  auto slot = [&](const std::vector<Opnd>& v, Ty t, int idx, u64* val) -> u64 { int es = tysz(t), per = v.size() * 4 / es, l = idx / per, i = idx % per, ri = i * es / 4, sf = i * es % 4 * 8; if (t == F32 || es == 4) { ri = i; sf = 0; } u64 old = get(v[ri], l, B32); if (!val) return es == 4 ? (u32)old : (old >> sf) & 0xffff; u64 nv = es == 4 ? *val : (old & ~(0xffffull << sf)) | (*val & 0xffff) << sf; put(v[ri], l, nv); return 0; };
  auto valf = [&](u64 r, Ty t) -> float { return t == F32 ? bits<float>(r) : t == TF32 ? bits<float>(r & 0xffffe000u) : t == F16 ? h2f(r) : bf2f(r); };
  if (I.m[0] == "load" || I.m[0] == "store") { bool ld = I.m[0] == "load"; const std::string& f = I.m[1]; bool col = I.has("col"); int R = f == "b" ? Kk : M, Cc = f == "a" ? Kk : N; Ty t = I.t.back(); auto& v = ld ? I.o[0].v : I.o[1].v; const Opnd& mo = ld ? I.o[1] : I.o[0]; cl = 0; u64 stride = I.o.size() > 2 ? get(I.o[2], 0, U32) : (col ? R : Cc); u64 base = ea(mo, 0);
    for (int r = 0; r < R; ++r) for (int c = 0; c < Cc; ++c) { cl = (r * Cc + c) % 32; u8* q = ptr(I.sp, base + (col ? c * stride + r : r * stride + c) * tysz(t), tysz(t), ld ? 0 : 1); if (ld) { u64 x = ldn(q, tysz(t)); slot(v, t, r * Cc + c, &x); } else { u64 x = slot(v, t, r * Cc + c, nullptr); memcpy(q, &x, tysz(t)); } } return; }
  st.mma++; Ty td = I.t[0], ta = I.t.size() > 2 ? I.t[1] : F16, tc = I.t.back(); std::vector<float> a(M * Kk), b(Kk * N); for (int i = 0; i < M * Kk; ++i) a[i] = valf(slot(I.o[1].v, ta, i, nullptr), ta); for (int i = 0; i < Kk * N; ++i) b[i] = valf(slot(I.o[2].v, ta, i, nullptr), ta);
  std::vector<float> d(M * N); for (int i = 0; i < M; ++i) for (int j = 0; j < N; ++j) { float s = valf(slot(I.o[3].v, tc, i * N + j, nullptr), tc); for (int x = 0; x < Kk; ++x) s += a[i * Kk + x] * b[x * N + j]; d[i * N + j] = s; }
  for (int i = 0; i < M * N; ++i) { u64 x = td == F32 ? pack(d[i]) : f2h(d[i]); slot(I.o[0].v, td, i, &x); }
}
void Machine::step(Warp& w) {
  cw = &w; u32 pc, m;
  if (!w.div) { pc = w.pc[__builtin_ctz(w.run)]; m = w.run; }
  else { pc = ~0u; LANES(w.run) pc = std::min(pc, w.pc[l]); m = 0; LANES(w.run) if (w.pc[l] == pc) m |= 1u << l; if (m == w.run && !w.syncw) w.div = false; else st.div++; }
  Instr& I = K->code[pc]; ci = &I; cl = __builtin_ctz(m);
  u32 e = m; if (I.g >= 0) { u32 gm = 0; auto& g = w.r[I.g]; LANES(m) if ((g[l] & 1) != I.gneg) gm |= 1u << l; e = gm; }
  icount++; st.winst++; st.tinst += __builtin_popcount(e); if (icount > cfg.maxinst) fail("instruction limit reached (endless loop?)");
  auto adv = [&](u32 x, u32 to) { LANES(x) w.pc[l] = to; };
  auto& o = I.o; Ty t = I.t[0];
  auto syncok = [&](u32 mask, const char* nm) -> bool { // all named lanes must be here
    mask &= w.exist; if (mask & ~w.alive) fail(std::string(nm) + ": mask names lanes that have exited"); if (e & ~mask) fail(std::string(nm) + ": executing lane not in member mask"); u32 here = e; LANES(w.syncw) if (w.pc[l] == pc) here |= 1u << l;
    if ((here & mask) == mask) { LANES(w.syncw & mask) {} w.syncw &= ~mask; w.run |= mask; e = mask; m |= mask; return true; }
    w.syncw |= e; w.run &= ~e; w.div = true; adv(m & ~e, pc + 1); if (!w.run) fail(std::string(nm) + ": lanes of the member mask never arrive (divergent warp collective)"); return false; };
  std::vector<u32> groups; bool multi = false;
  auto syncl = [&](const Opnd& mo, const char* nm) -> bool { // member masks may differ between lanes (e.g. tiles of 8)
    u32 m0 = (u32)get(mo, cl, B32) & w.exist; multi = false; groups.clear(); LANES(e) if (((u32)get(mo, l, B32) & w.exist) != m0) multi = true;
    if (!multi) { if (!syncok(m0, nm)) return false; groups.push_back(e); return true; }
    u32 left = e; LANES(e) { u32 mk = (u32)get(mo, l, B32) & w.exist; cl = l; if (!(mk >> l & 1)) fail(std::string(nm) + ": executing lane not in its member mask"); if ((mk & e) != mk) fail(std::string(nm) + ": lanes of the member mask are not converged here (sub-warp tile)"); if (left >> l & 1) { groups.push_back(mk); if ((left & mk) != mk) fail(std::string(nm) + ": overlapping member masks"); left &= ~mk; } }
    return true; };
  switch (I.code) {
    case C_BRA: { u32 nt = m & ~e; adv(e, I.target); adv(nt, pc + 1); if (e && nt) w.div = true; return; }
    case C_RET: { LANES(e) { if (!w.open[l].empty() || !w.grp[l].empty()) { bool any = !w.open[l].empty(); for (auto& g : w.grp[l]) any |= !g.empty(); if (any) { cl = l; fail("thread exits with cp.async still in flight"); } } } w.run &= ~e; w.alive &= ~e; adv(m & ~e, pc + 1); return; }
    case C_NOP: break;
    case C_TRAP: if (e) fail("trap"); break;
    case C_CALL: if (e) fail("device function call (not supported; assert/printf?)"); break;
    case C_MOV: 
      if (o[1].k == O_VEC) { int n = o[1].v.size(), es = tysz(t) / n; LANES(e) { u64 v = 0; for (int i = 0; i < n; ++i) { u64 x = get(o[1].v[i], l, B32); v |= (es == 8 ? x : x & ((1ull << es * 8) - 1)) << (8 * es * i); } put(o[0], l, v); } }
      else if (o[0].k == O_VEC) { int n = o[0].v.size(), es = tysz(t) / n; LANES(e) { u64 v = get(o[1], l, t); for (int i = 0; i < n; ++i) put(o[0].v[i], l, v >> (8 * es * i) & (es == 8 ? ~0ull : (1ull << es * 8) - 1)); } }
      else if (o[1].k == O_REG && !o[1].neg) { auto& d = w.r[o[0].reg]; auto& s = w.r[o[1].reg]; if (e == ~0u) d = s; else LANES(e) d[l] = s[l]; }
      else LANES(e) { cl = l; put(o[0], l, t == PRED ? get(o[1], l, t) & 1 : zx(get(o[1], l, t), t)); }
      break;
    case C_ADD: case C_SUB: case C_MUL: case C_MAD: case C_FMA: case C_DIV: case C_REM: case C_ABS: case C_NEG: case C_MIN: case C_MAX: case C_SAD: arith(I, e); break;
    case C_AND: case C_OR: case C_XOR: LANES(e) { u64 a = get(o[1], l, t), b = get(o[2], l, t), r = I.code == C_AND ? a & b : I.code == C_OR ? a | b : a ^ b; put(o[0], l, t == PRED ? r & 1 : zx(r, t)); } break;
    case C_NOT: LANES(e) { u64 a = get(o[1], l, t); put(o[0], l, t == PRED ? !a : zx(~a, t)); } break;
    case C_CNOT: LANES(e) put(o[0], l, zx(get(o[1], l, t), t) == 0); break;
    case C_SHL: LANES(e) { u32 s = (u32)get(o[2], l, U32); put(o[0], l, s >= (u32)tysz(t) * 8 ? 0 : zx(get(o[1], l, t) << s, t)); } break;
    case C_SHR: LANES(e) { u32 s = (u32)get(o[2], l, U32); u64 a = get(o[1], l, t); u32 bn = tysz(t) * 8; put(o[0], l, issigned(t) ? zx((u64)(sx(a, t) >> std::min(s, bn - 1)), t) : s >= bn ? 0 : zx(a, t) >> s); } break;
    case C_SHF: { bool left = I.m[0] == "l", wrap = I.has("wrap"); LANES(e) { u64 a = (u32)get(o[1], l, B32), b = (u32)get(o[2], l, B32); u32 c = (u32)get(o[3], l, U32); c = wrap ? c & 31 : std::min(c, 32u); u64 v = b << 32 | a; put(o[0], l, left ? (u32)((v << c) >> 32) : (u32)(v >> c)); } break; }
    case C_LOP3: LANES(e) { u32 a = get(o[1], l, B32), b = get(o[2], l, B32), c = get(o[3], l, B32), lut = o[4].imm, r = 0; for (int i = 0; i < 8; ++i) if (lut >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c); put(o[0], l, r); } break;
    case C_BFE: LANES(e) { u64 a = zx(get(o[1], l, t), t); u32 ps = get(o[2], l, U32) & 255, ln = get(o[3], l, U32) & 255, bn = tysz(t) * 8; u64 r = 0; u64 sb = issigned(t) && ln ? a >> std::min(ps + ln - 1, bn - 1) & 1 : 0; for (u32 i = 0; i < bn; ++i) r |= (u64)(i < ln && ps + i < bn ? a >> (ps + i) & 1 : sb) << i; put(o[0], l, r); } break;
    case C_BFI: LANES(e) { u64 f = get(o[1], l, t), b = get(o[2], l, t); u32 ps = get(o[3], l, U32) & 255, ln = get(o[4], l, U32) & 255, bn = tysz(t) * 8; for (u32 i = 0; i < ln && ps + i < bn; ++i) { b &= ~(1ull << (ps + i)); b |= (f >> i & 1) << (ps + i); } put(o[0], l, zx(b, t)); } break;
    case C_BFIND: LANES(e) { u64 a = zx(get(o[1], l, t), t); if (issigned(t) && sx(a, t) < 0) a = zx(~a, t); int r = a ? 63 - __builtin_clzll(a) : -1; if (I.has("shiftamt") && r >= 0) r = tysz(t) * 8 - 1 - r; put(o[0], l, (u32)r); } break;
    case C_BREV: LANES(e) { u64 a = get(o[1], l, t), r = 0; int bn = tysz(t) * 8; for (int i = 0; i < bn; ++i) r |= (a >> i & 1) << (bn - 1 - i); put(o[0], l, r); } break;
    case C_CLZ: LANES(e) { u64 a = zx(get(o[1], l, t), t); put(o[0], l, a ? __builtin_clzll(a) - (64 - tysz(t) * 8) : tysz(t) * 8); } break;
    case C_POPC: LANES(e) put(o[0], l, __builtin_popcountll(zx(get(o[1], l, t), t))); break;
    case C_BMSK: LANES(e) { u32 a = get(o[1], l, B32) & 31, b = get(o[2], l, B32); put(o[0], l, (u32)(((1ull << std::min(b, 32u)) - 1) << a)); } break;
    case C_PRMT: { if (I.m.size() > 1) fail("prmt mode"); LANES(e) { u64 v = (u64)(u32)get(o[2], l, B32) << 32 | (u32)get(o[1], l, B32); u32 s = get(o[3], l, B32), r = 0; for (int i = 0; i < 4; ++i) { u32 q = s >> 4 * i; u8 b = v >> 8 * (q & 7); if (q & 8) b = b & 0x80 ? 0xff : 0; r |= (u32)b << 8 * i; } put(o[0], l, r); } break; }
    case C_SETP: case C_SET: setp(I, e); break;
    case C_SELP: LANES(e) { bool c = get(o[3], l, PRED) & 1; put(o[0], l, zx(get(o[c ? 1 : 2], l, t), t)); } break;
    case C_CVT: cvt(I, e); break;
    case C_CVTA: LANES(e) { u64 a = get(o[1], l, U64); u64 base = I.sp == SHARED ? SHB : I.sp == LOCAL ? LCB : 0; put(o[0], l, I.has("to") ? a - base : a + base); } break;
    case C_ISSPACEP: LANES(e) { u64 a = get(o[1], l, U64); bool s = a >= SHB && a < SHB + (1ull << 32), lo = a >= LCB && a < LCB + (1ull << 32); put(o[0], l, I.sp == SHARED ? s : I.sp == LOCAL ? lo : I.sp == GLOBAL ? !s && !lo : 0); } break;
    case C_LD: case C_ST: if (e) memop(I, e); break;
    case C_ATOM: case C_RED: if (e) atomic(I, e); break;
    case C_EX2: case C_LG2: case C_RCP: case C_SQRT: case C_RSQRT: case C_SIN: case C_COS: case C_TANH: LANES(e) { cl = l; auto fn = [&](double x) { switch (I.code) { case C_EX2: return exp2(x); case C_LG2: return log2(x); case C_RCP: return 1 / x; case C_SQRT: return sqrt(x); case C_RSQRT: return 1 / sqrt(x); case C_SIN: return sin(x); case C_COS: return cos(x); default: return tanh(x); } };
        if (t == F16X2 || t == BF16X2) { u32 v = get(o[1], l, B32), r = 0; for (int h = 0; h < 2; ++h) { u16 x = v >> 16 * h; r |= (u32)(t == F16X2 ? f2h(fn(h2f(x))) : f2bf(fn(bf2f(x)))) << 16 * h; } put(o[0], l, r); }
        else if (t == F32) put(o[0], l, pack(fz((float)fn(fz(bits<float>(get(o[1], l, t)), I.ftz)), I.ftz))); else if (t == F64) put(o[0], l, pack(fn(bits<double>(get(o[1], l, t))))); else if (t == F16) put(o[0], l, f2h(fn(h2f(get(o[1], l, t))))); else put(o[0], l, f2bf(fn(bf2f(get(o[1], l, t))))); } break;
    case C_COPYSIGN: LANES(e) put(o[0], l, pack(copysignf(bits<float>(get(o[2], l, t)), bits<float>(get(o[1], l, t))))); break;
    case C_TESTP: LANES(e) { double x = tof(get(o[1], l, t), t); const std::string& c = I.m[0]; put(o[0], l, c == "finite" ? std::isfinite(x) : c == "infinite" ? std::isinf(x) : c == "number" ? x == x : c == "notanumber" ? x != x : c == "normal" ? std::isnormal(x) : 0); } break;
    case C_ACTIVE: LANES(e) put(o[0], l, m); break;
    case C_DP4A: LANES(e) { u32 a = get(o[1], l, B32), b = get(o[2], l, B32); i64 s = (i32)get(o[3], l, B32); for (int i = 0; i < 4; ++i) { i64 x = I.t[0] == S32 ? (int8_t)(a >> 8 * i) : (u8)(a >> 8 * i), y = I.t.back() == S32 ? (int8_t)(b >> 8 * i) : (u8)(b >> 8 * i); s += x * y; } put(o[0], l, (u32)s); } break;
    case C_SHFL: { if (!e) break; const std::string& md = I.m[0] == "sync" ? I.m[1] : I.m[0]; if (!syncl(o[4], "shfl.sync")) return;
      u64 src[32]; LANES(e) src[l] = get(o[1], l, B32);
      LANES(e) { cl = l; u32 b = (u32)get(o[2], l, B32) & 31, c = (u32)get(o[3], l, B32), seg = c >> 8 & 31, cv = c & 31; int mx = (l & seg) | (cv & ~seg), mn = l & seg, j; bool p; if (md == "up") { j = l - (int)b; p = j >= mx; } else if (md == "down") { j = l + b; p = j <= mx; } else if (md == "bfly") { j = l ^ b; p = j <= mx; } else { j = mn | (b & ~seg); p = j <= mx; } if (!p) j = l; if (!((u32)get(o[4], l, B32) >> j & 1)) fail("shfl.sync reads from a lane outside the member mask"); put(o[0], l, src[j]); if (o[0].reg2 >= 0) w.r[o[0].reg2][l] = p; } break; }
    case C_VOTE: { if (!e) break; if (!syncl(o[2], "vote.sync")) return; const std::string& md = I.m[1]; for (u32 e : groups) { u32 b = 0; LANES(e) if (get(o[1], l, PRED) & 1) b |= 1u << l; LANES(e) put(o[0], l, md == "ballot" ? b : md == "any" ? b != 0 : md == "all" ? b == e : (b == e || b == 0)); } break; }
    case C_REDUX: { if (!e) break; if (!syncl(o[2], "redux.sync")) return; std::string op = I.m[1]; for (u32 e : groups) { bool f = t == F32; u64 acc = 0; bool first = true; LANES(e) { u64 v = get(o[1], l, t); if (first) { acc = v; first = false; continue; } if (f) { float x = bits<float>(acc), y = bits<float>(v); acc = pack(op == "min" ? fminf(x, y) : fmaxf(x, y)); } else if (op == "add") acc += v; else if (op == "and") acc &= v; else if (op == "or") acc |= v; else if (op == "xor") acc ^= v; else if (op == "min") acc = issigned(t) ? (u64)std::min(sx(acc, t), sx(v, t)) : std::min(zx(acc, t), zx(v, t)); else acc = issigned(t) ? (u64)std::max(sx(acc, t), sx(v, t)) : std::max(zx(acc, t), zx(v, t)); } LANES(e) put(o[0], l, zx(acc, t)); } break; }
    case C_ELECT: { if (!e) break; if (!syncok((u32)get(o[1], cl, B32), "elect.sync")) return; int ld = __builtin_ctz(e); LANES(e) { put(o[0], l, ld); if (o[0].reg2 >= 0) w.r[o[0].reg2][l] = l == ld; } break; }
    case C_MATCH: { if (!e) break; if (!syncl(o[2], "match.sync")) return; for (u32 e : groups) { u64 v[32]; LANES(e) v[l] = zx(get(o[1], l, I.t.back()), I.t.back()); LANES(e) { u32 r = 0; for (int j = 0; j < 32; ++j) if (e >> j & 1 && v[j] == v[l]) r |= 1u << j; if (I.has("all")) { put(o[0], l, r == e ? e : 0); if (o[0].reg2 >= 0) w.r[o[0].reg2][l] = r == e; } else put(o[0], l, r); } } break; }
    case C_BAR: { if (!e) break;
      if (I.m.size() && I.m[0] == "warp") { if (!syncl(o[0], "bar.warp.sync")) return; w.wep++; break; }
      if (I.m.size() && I.m[0] == "cluster") break;
      bool arrive = I.has("arrive"), redu = I.has("red"); if (redu) fail("bar.red"); int id = (int)get(o[0], cl, U32), want = o.size() > 1 ? (int)get(o[1], cl, U32) : 0; if (id > 15) fail("barrier id");
      if (e != w.alive && !(w.div && (e | w.barw) == w.alive)) { if (!I.has("noaligned") && I.op == "bar") fail("divergent barrier: bar.sync executed by a part of the warp (lanes " + std::to_string(__builtin_popcount(e)) + " of " + std::to_string(__builtin_popcount(w.alive)) + ")"); }
      Bar& b = bars[id]; int alive = 0; for (auto& x : W) alive += __builtin_popcount(x.alive); int tot = want ? want : alive; if (!want && alive != nthreads) { warns.push_back("bar.sync after some threads have exited" + where()); if (warns.size() > 20) warns.resize(20); }
      if (b.n && b.want != tot && want) fail("barrier thread counts differ"); b.want = tot; b.n += __builtin_popcount(e); st.bar++; adv(m, pc + 1);
      if (!arrive) { w.barw |= e; w.run &= ~e; LANES(e) w.barid[l] = id; }
      if (b.n == tot) { b.n = 0; epoch++; for (auto& x : W) LANES(x.barw) if ((int)x.barid[l] == id) { x.barw &= ~(1u << l); x.run |= 1u << l; } } else if (b.n > tot) fail("too many threads at barrier");
      return; }
    case C_CP: if (e) cp(I, e); break;
    case C_LDM: case C_STM: { if (!e) break; if (!syncok(~0u, I.op.c_str())) return; int nm = I.has("x4") ? 4 : I.has("x2") ? 2 : 1; bool tr = I.has("trans"); bool ld = I.code == C_LDM; const Opnd& mo = o[ld ? 1 : 0]; const Opnd& vo = o[ld ? 0 : 1]; auto rg = [&](int i) -> const Opnd& { return vo.k == O_VEC ? vo.v[i] : vo; };
      for (int q = 0; q < nm; ++q) { u64 a[32] = {}; u8* rp[8]; for (int r = 0; r < 8; ++r) { cl = q * 8 + r; a[r] = ea(mo, cl); rp[r] = ptr(I.sp, a[r], 16, ld ? 0 : 1); } 
        std::map<int, std::set<u64>> bk; for (int r = 0; r < 8; ++r) for (int k2 = 0; k2 < 4; ++k2) { u64 wd = (a[r] & 0xffffffffu) / 4 + k2; bk[wd % 32].insert(wd); } size_t mx = 0; for (auto& x : bk) mx = std::max(mx, x.second.size()); st.sh_wave += mx; st.sh_req += q == 0;
        for (int l = 0; l < 32; ++l) { u16 h[2]; if (ld) { for (int i = 0; i < 2; ++i) h[i] = tr ? ((u16*)rp[(l & 3) * 2 + i])[l >> 2] : ((u16*)rp[l >> 2])[(l & 3) * 2 + i]; put(rg(q), l, (u32)h[0] | (u32)h[1] << 16); } else { u32 v = get(rg(q), l, B32); for (int i = 0; i < 2; ++i) (tr ? ((u16*)rp[(l & 3) * 2 + i])[l >> 2] : ((u16*)rp[l >> 2])[(l & 3) * 2 + i]) = v >> 16 * i; } } }
      break; }
    case C_MMA: if (!e) break; if (!syncok(~0u, "mma.sync")) return; mma(I); break;
    case C_WMMA: if (!e) break; if (!syncok(~0u, "wmma")) return; wmma(I); break;
    case C_WGMMA: if (!e) break; if (!syncok(~0u, "wgmma")) return; wgmma(I, e); break;
    default: fail("PTX instruction not implemented: " + I.op);
  }
  adv(m, pc + 1);
}
void Machine::run(Kernel& k, const u32* g, const u32* b, u64 dyn, void** args) {
  K = &k; memcpy(grid, g, 12); memcpy(blk, b, 12); nthreads = b[0] * b[1] * b[2]; if (nthreads < 1 || nthreads > 1024) throw Err("bad block size"); st = {}; icount = 0; warns.clear(); rng.seed(cfg.seed);
  for (auto& r : reg) r.sh.clear(); last = nullptr; ci = nullptr; cw = nullptr;
  for (auto& kv : k.syms) if (kv.second.sp == GLOBAL) { bool have = false; for (auto& r : reg) have |= r.lo == kv.second.off; if (!have) reg.push_back({kv.second.off, kv.second.off + kv.second.size, kv.first, false, {}}); }
  par.assign(k.psize + 16, 0); for (size_t i = 0; i < k.params.size(); ++i) memcpy(par.data() + k.params[i].off, args[i], k.params[i].size);
  dynoff = (k.shared + 1023) / 1024 * 1024; if (!k.shared) dynoff = 0; dynsz = dyn; u64 tot = dyn ? dynoff + dyn : k.shared; if (tot > 232448) throw Err("shared memory over 227 KB: " + std::to_string(tot));
  u64 nb = (u64)g[0] * g[1] * g[2]; std::vector<u64> order(nb); for (u64 i = 0; i < nb; ++i) order[i] = i; if (cfg.seed) std::shuffle(order.begin(), order.end(), rng);
  int nw = (nthreads + 31) / 32; W.clear(); W.resize(nw);
  for (u64 bi : order) { blin = (u32)bi; cta[0] = bi % g[0]; cta[1] = bi / g[0] % g[1]; cta[2] = bi / g[0] / g[1];
    smem.assign(tot, 0xFF); sval.assign(tot, 0); ssh.assign(cfg.races ? tot : 0, Shadow()); lmem.assign((k.local + 15) / 16 * 16 * nthreads, 0xCC); epoch = 1; for (auto& x : bars) x = Bar();
    for (int i = 0; i < nw; ++i) { Warp& w = W[i]; w.id = i; int n = std::min(32, nthreads - i * 32); w.exist = w.alive = w.run = n == 32 ? ~0u : (1u << n) - 1; memset(w.pc, 0, sizeof w.pc); w.div = false; w.barw = w.syncw = 0; w.r.assign(k.nreg, {}); for (int l = 0; l < 32; ++l) { w.open[l].clear(); w.grp[l].clear(); } 
      for (auto& x : w.r) x.fill(0xDEADBEEFDEADBEEFull); }
    for (;;) { bool any = false, alive = false; 
      if (cfg.seed) { std::vector<int> rd; for (int i = 0; i < nw; ++i) { if (W[i].run) rd.push_back(i); alive |= W[i].alive != 0; } if (!rd.empty()) { any = true; Warp& w = W[rd[rng() % rd.size()]]; int q = 1 + rng() % 40; while (w.run && q--) step(w); } }
      else for (auto& w : W) { while (w.run) { step(w); any = true; } alive |= w.alive != 0; }
      if (!any) { if (alive) { std::string s; for (auto& w : W) if (w.alive) s += " warp " + std::to_string(w.id) + (w.barw ? " at barrier" : "") + ","; throw Err("DEADLOCK in block " + std::to_string(bi) + ":" + s + " other threads have exited or wait elsewhere"); } break; } }
    if (cfg.seed == 0 || true) {} }
  for (size_t i = 0; i < k.code.size(); ++i) {}
}
// ------------------------------------------------------------------ C API
struct H { Module m; Machine mc; std::string err; };
namespace proto {
H* ptx_load(const char* src, char* err, int n) { H* h = new H; try { Parser p(h->m, src); p.parse(); return h; } catch (std::exception& e) { snprintf(err, n, "%s", e.what()); delete h; return nullptr; } }
void ptx_free(H* h) { delete h; }
void ptx_cfg(H* h, int bounds, int races, int uninit, int seed, int warprace, int gridrace) { auto& c = h->mc.cfg; c.bounds = bounds; c.races = races; c.uninit = uninit; c.seed = seed; c.warprace = warprace; c.gridrace = gridrace; }
void ptx_clear(H* h) { h->mc.reg.clear(); }
void ptx_region(H* h, u64 p, u64 n, const char* name, int ro) { h->mc.reg.push_back({p, p + n, name, (bool)ro, {}}); }
int ptx_kernels(H* h, char* out, int n) { std::string s; for (auto& k : h->m.k) { s += k.first + " " + std::to_string(k.second.params.size()) + " " + std::to_string(k.second.shared) + " " + std::to_string(k.second.code.size()) + "\n"; } snprintf(out, n, "%s", s.c_str()); return h->m.k.size(); }
int ptx_launch(H* h, const char* name, const u32* g, const u32* b, u64 dyn, void** args, char* err, int n) { try { auto it = h->m.k.find(name); if (it == h->m.k.end()) throw Err("no such kernel"); h->mc.run(it->second, g, b, dyn, args); std::string w; for (auto& s : h->mc.warns) w += s + "\n"; snprintf(err, n, "%s", w.c_str()); return 0; } catch (std::exception& e) { snprintf(err, n, "%s", e.what()); return 1; } }
void ptx_stats(H* h, u64* o) { memcpy(o, &h->mc.st, sizeof(Stats)); }
}
