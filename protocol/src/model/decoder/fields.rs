//! A configuration's fields, taken one by one by name, so that what nobody took can be refused.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::refuse;
use crate::Error;

/// No published model comes near; products of two sizes fit in 64 bits.
const LARGEST: u64 = 1 << 24;

/// Fields of Hugging Face configurations that do not change the logits.
pub(super) const INERT: &[&str] = &[
    "_attn_implementation_autoset",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "max_length",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "torchscript",
    "transformers.",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// What is left of an object of `file`.
pub(super) struct Fields {
    file: String,
    /// Before a field's name in errors, for nested objects.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Fields, Error> {
        match serde_json::from_slice(bytes) {
            Ok(map) => Ok(Fields::new(file, map)),
            Err(e) => refuse(format!("{file}: {e}")),
        }
    }

    pub(super) fn new(file: &str, map: Map<String, Value>) -> Fields {
        Fields { file: file.into(), prefix: String::new(), map }
    }

    /// The field, or `absent` where there is none. `null` is a value: `T` says whether it is one of its own.
    pub(super) fn or<T: DeserializeOwned>(&mut self, name: &str, absent: T) -> Result<T, Error> {
        let Some(value) = self.map.remove(name) else {
            return Ok(absent);
        };
        let shown = shown(&value);
        serde_json::from_value(value).or_else(|e| self.refuse(name, format!("{shown} is not supported: {e}")))
    }

    pub(super) fn required<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, Error> {
        match self.or(name, None)? {
            Some(value) => Ok(value),
            None => self.refuse(name, "is missing".into()),
        }
    }

    /// A count that cannot be zero.
    pub(super) fn size(&mut self, name: &str) -> Result<usize, Error> {
        match self.optional_size(name)? {
            Some(size) => Ok(size),
            None => self.refuse(name, "is missing".into()),
        }
    }

    /// As [`Fields::size`]; absent and `null` are the same.
    pub(super) fn optional_size(&mut self, name: &str) -> Result<Option<usize>, Error> {
        match self.or::<Option<u64>>(name, None)? {
            None => Ok(None),
            Some(size @ 1..=LARGEST) => Ok(Some(size as usize)),
            Some(size) => self.refuse(name, format!("{size} is out of range, it must be 1 to {LARGEST}")),
        }
    }

    /// `name`, or an even part of `hidden` for each head.
    pub(super) fn head_dim(&mut self, name: &str, hidden: usize, heads: usize) -> Result<usize, Error> {
        match self.optional_size(name)? {
            Some(width) => Ok(width),
            None if hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => self.refuse(name, format!("is missing, and width {hidden} is not a multiple of {heads} heads")),
        }
    }

    /// A finite number above zero.
    pub(super) fn positive(&mut self, name: &str, absent: Option<f64>) -> Result<f64, Error> {
        let value = match absent {
            Some(absent) => self.or(name, absent)?,
            None => self.required(name)?,
        };
        if !(value.is_finite() && value > 0.0) {
            return self.refuse(name, format!("{value} is out of range, it must be above zero"));
        }
        Ok(value)
    }

    /// The base of rotary positions.
    pub(super) fn theta(&mut self, name: &str, absent: f64) -> Result<f64, Error> {
        match self.positive(name, Some(absent))? {
            theta if theta > 1.0 => Ok(theta),
            theta => self.refuse(name, format!("{theta} is out of range, it must be above one")),
        }
    }

    /// Token ids: one, a list, `null` or absent.
    pub(super) fn ids(&mut self, name: &str) -> Result<Vec<u32>, Error> {
        match self.or(name, Value::Null)? {
            Value::Null => Ok(Vec::new()),
            Value::Array(list) => serde_json::from_value(Value::Array(list)),
            one => serde_json::from_value(one).map(|id| vec![id]),
        }
        .or_else(|e| self.refuse(name, format!("is not supported: {e}")))
    }

    /// Absent, or equal to `value`.
    pub(super) fn only(&mut self, name: &str, value: impl Into<Value>) -> Result<(), Error> {
        let value = value.into();
        match self.map.remove(name) {
            Some(other) if other != value => {
                self.refuse(name, format!("{} is not supported, only {value} is", shown(&other)))
            }
            _ => Ok(()),
        }
    }

    /// A nested object; `None` where it is absent or `null`.
    pub(super) fn object(&mut self, name: &str) -> Result<Option<Fields>, Error> {
        let map: Option<Map<String, Value>> = self.or(name, None)?;
        let prefix = format!("{}{name}.", self.prefix);
        Ok(map.map(|map| Fields { file: self.file.clone(), prefix, map }))
    }

    /// Refuses the first field that was neither taken nor is in `inert`, where a name that ends in a dot stands for all
    /// that begin with it.
    pub(super) fn finish(self, inert: &[&[&str]]) -> Result<(), Error> {
        let known =
            |name: &str| inert.iter().copied().flatten().any(|i| name == *i || i.ends_with('.') && name.starts_with(i));
        match self.map.iter().find(|(name, _)| !known(name)) {
            Some((name, value)) => self.refuse(name, format!("{} is not supported", shown(value))),
            None => Ok(()),
        }
    }

    pub(super) fn refuse<T>(&self, name: &str, why: String) -> Result<T, Error> {
        refuse(format!("{}: {}{name} {why}", self.file, self.prefix))
    }
}

/// Short enough for an error.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
