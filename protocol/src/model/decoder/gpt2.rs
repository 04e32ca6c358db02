//! GPT-2 (Radford et al., 2019): layer norms, learned positions, one projection to queries, keys and values, and every
//! weight matrix stored as `inp x out`.

use super::fields::{Fields, INERT};
use super::weights::Weights;
use super::{Activation, Config, DecoderLayer, Dense, Last, Mlp, NormKind};
use crate::Error;

/// Of other heads than the language model's, of training, and of arithmetic that only reorders.
const INERT_HERE: &[&str] = &[
    "attn_pdrop",
    "embd_pdrop",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
];

pub(super) struct Gpt2 {
    pub(super) config: Config,
    tied: bool,
}

pub(super) fn read(mut f: Fields) -> Result<Gpt2, Error> {
    let (hidden, heads) = (f.size("n_embd")?, f.size("n_head")?);
    if !hidden.is_multiple_of(heads) {
        return f.refuse("n_embd", format!("{hidden} is not a multiple of n_head {heads}"));
    }
    let max_positions = f.size("n_positions")?;
    f.only("n_ctx", max_positions)?;
    f.only("activation_function", "gelu_new")?;
    f.only("scale_attn_weights", true)?;
    f.only("scale_attn_by_inverse_layer_idx", false)?;
    f.only("add_cross_attention", false)?;
    f.only("is_encoder_decoder", false)?;
    let gpt2 = Gpt2 {
        config: Config {
            family: "gpt2",
            layers: f.size("n_layer")?,
            hidden,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            intermediate: f.optional_size("n_inner")?.unwrap_or(4 * hidden),
            vocab: f.size("vocab_size")?,
            max_positions,
            norm: NormKind::Layer,
            eps: f.positive("layer_norm_epsilon", Some(1e-5))?,
            activation: Activation::GeluNew,
            rope: None,
            bos: f.ids("bos_token_id")?.first().copied(),
            eos: f.ids("eos_token_id")?,
        },
        tied: f.or("tie_word_embeddings", true)?,
    };
    f.finish(&[INERT, INERT_HERE])?;
    Ok(gpt2)
}

impl Gpt2 {
    /// The first published files hold the model without its head, and so without the prefix.
    fn prefix(w: &Weights) -> &'static str {
        if w.has("ln_f.weight") { "" } else { "transformer." }
    }

    /// Token ids -> [n, h].
    pub(super) fn table(w: &Weights) -> String {
        format!("{}wte.weight", Self::prefix(w))
    }

    /// Positions -> [n, h].
    pub(super) fn positions(&self, w: &mut Weights) -> Result<Vec<f32>, Error> {
        let (c, t) = (&self.config, Self::prefix(w));
        w.take(&format!("{t}wpe.weight"), &[c.max_positions, c.hidden])
    }

    /// Block `i`, by its Hugging Face names.
    pub(super) fn layer(&self, w: &mut Weights, i: usize) -> Result<DecoderLayer, Error> {
        let (h, f) = (self.config.hidden, self.config.intermediate);
        let p = format!("{}h.{i}", Self::prefix(w));
        // 1. [n, h] -> [n, h]
        let attention_norm = w.norm(&format!("{p}.ln_1"), h, true)?;
        // 2. [n, h] -> [n, 3 h], which is three of [n, heads, d]
        let [query, key, value] = projections(w, &format!("{p}.attn.c_attn"), h, h)?;
        Ok(DecoderLayer {
            attention_norm,
            query,
            key,
            value,
            query_key_norm: None,
            // 3. causal attention: [n, heads, d] -> [n, h], added to the rows
            output: projection(w, &format!("{p}.attn.c_proj"), h, h)?,
            // 4. [n, h] -> [n, f] -> [n, h], added to the rows
            mlp_norm: w.norm(&format!("{p}.ln_2"), h, true)?,
            mlp: Mlp::Plain {
                up: projection(w, &format!("{p}.mlp.c_fc"), f, h)?,
                down: projection(w, &format!("{p}.mlp.c_proj"), h, f)?,
            },
        })
    }

    /// [n, h] -> [n, h] -> [n, vocab].
    pub(super) fn last(&self, w: &mut Weights) -> Result<Last, Error> {
        let (c, table) = (&self.config, Self::table(w));
        let norm = w.norm(&format!("{}ln_f", Self::prefix(w)), c.hidden, true)?;
        Ok(Last { norm, head: w.head(&table, (c.vocab, c.hidden), self.tied)? })
    }
}

fn projection(w: &mut Weights, name: &str, out: usize, inp: usize) -> Result<Dense, Error> {
    let [dense] = projections(w, name, out, inp)?;
    Ok(dense)
}

/// `N` layers side by side in one stored matrix of `inp x N out`.
fn projections<const N: usize>(w: &mut Weights, name: &str, out: usize, inp: usize) -> Result<[Dense; N], Error> {
    let stored = w.take(&format!("{name}.weight"), &[inp, N * out])?;
    let bias = w.take(&format!("{name}.bias"), &[N * out])?;
    Ok(std::array::from_fn(|part| {
        let mut weight = Vec::with_capacity(out * inp);
        for o in part * out..(part + 1) * out {
            weight.extend(stored.iter().skip(o).step_by(N * out));
        }
        Dense { weight, bias: bias[part * out..(part + 1) * out].to_vec(), out, inp }
    }))
}
