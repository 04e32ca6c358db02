//! Chat templates, rendered as transformers renders them (`apply_chat_template`, `_compile_jinja_template`).

use std::collections::BTreeMap;
use std::path::Path;
use std::time::SystemTime;

use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::Serialize;

use super::python::{dumps, strftime};
use super::{GenerateError, parameter};

/// More than any real template takes; ends one that loops without end.
const FUEL: u64 = 10_000_000;

/// One message of a chat.
#[derive(Clone, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; templates refuse others by themselves.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Who said it, if the caller tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// A message without a name.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into(), name: None }
    }
}

/// A model's chat template with its special tokens.
#[derive(Clone)]
pub struct ChatTemplate {
    source: String,
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// A template from its source; `tokens` are variables such as `bos_token`.
    ///
    /// # Errors
    /// [`GenerateError::Template`] with the line of a syntax error.
    pub fn new(source: &str, tokens: BTreeMap<String, String>) -> Result<ChatTemplate, GenerateError> {
        // `generation` marks assistant text for training; it prints nothing.
        let mut out = String::with_capacity(source.len());
        for (i, part) in source.split("{%").enumerate() {
            if i > 0 {
                out.push_str("{%");
            }
            let word = part.trim_start_matches(['-', '+']).trim_start();
            let rest = part.len() - word.len();
            if let Some(w) = word.strip_prefix("endgeneration") {
                out.push_str(&format!("{}endif{w}", &part[..rest]));
            } else if let Some(w) =
                word.strip_prefix("generation").filter(|w| w.trim_start_matches(['-', ' ']).starts_with("%}"))
            {
                out.push_str(&format!("{}if true{w}", &part[..rest]));
            } else {
                out.push_str(part);
            }
        }
        let template = ChatTemplate { source: out, tokens };
        environment().template_from_named_str("chat_template", &template.source).map_err(bad)?;
        Ok(template)
    }

    /// The template of a model's directory: `chat_template.jinja`, or `chat_template` in tokenizer_config.json. `None` if
    /// the model has none.
    ///
    /// # Errors
    /// A file that cannot be read or parsed.
    pub fn load(dir: &Path) -> Result<Option<ChatTemplate>, GenerateError> {
        let config = config(dir)?;
        let source = match (read(&dir.join("chat_template.jinja"))?, &config["chat_template"]) {
            (Some(s), _) => s,
            (None, serde_json::Value::String(s)) => s.clone(),
            (None, serde_json::Value::Array(named)) => {
                let default = named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
                let Some(s) = default else {
                    return Err(GenerateError::Template("none of the model's templates is named \"default\"".into()));
                };
                s.into()
            }
            _ => return Ok(None),
        };
        ChatTemplate::new(&source, special(&config)).map(Some)
    }

    /// A template from a file of its own, with the special tokens of a model's directory.
    ///
    /// # Errors
    /// A file that cannot be read or parsed.
    pub fn from_file(file: &Path, dir: &Path) -> Result<ChatTemplate, GenerateError> {
        let named = |e: String| GenerateError::Template(format!("{}: {e}", file.display()));
        let source = read(file)?.ok_or_else(|| named("there is no such file".into()))?;
        match ChatTemplate::new(&source, special(&config(dir)?)) {
            Err(GenerateError::Template(e)) => Err(named(e)),
            r => r,
        }
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a chat. `answer` appends what makes the model answer (`add_generation_prompt`); `variables` are handed to
    /// the template as they are (`enable_thinking` and its like); `now` is for `strftime_now`, in UTC.
    ///
    /// # Errors
    /// [`GenerateError::Template`] with the template's own words if it refuses the messages.
    pub fn render(
        &self,
        messages: &[Message],
        answer: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
        now: SystemTime,
    ) -> Result<String, GenerateError> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        self.tokens.iter().for_each(|(k, v)| _ = context.insert(k, Value::from(v.as_str())));
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        for (k, v) in variables {
            if ["messages", "add_generation_prompt", "tools", "documents"].contains(&k.as_str()) {
                return Err(parameter("chat_template_kwargs", format!("{k:?} cannot be set here")));
            }
            context.insert(k, Value::from_serialize(v));
        }
        context.insert("messages", Value::from_serialize(messages));
        context.insert("add_generation_prompt", Value::from(answer));
        context.insert("strftime_now", Value::from_function(move |f: String| strftime(now, &f)));
        environment().template_from_named_str("chat_template", &self.source).map_err(bad)?.render(context).map_err(bad)
    }
}

/// A file's text, if there is one.
fn read(file: &Path) -> Result<Option<String>, GenerateError> {
    match std::fs::read_to_string(file) {
        Ok(s) => Ok(Some(s)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(GenerateError::Template(format!("{}: {e}", file.display()))),
    }
}

fn config(dir: &Path) -> Result<serde_json::Value, GenerateError> {
    let file = dir.join("tokenizer_config.json");
    let text = read(&file)?.unwrap_or_else(|| "{}".into());
    serde_json::from_str(&text).map_err(|e| GenerateError::Template(format!("{}: {e}", file.display())))
}

/// The special tokens that tokenizer_config.json names, as templates call them.
fn special(config: &serde_json::Value) -> BTreeMap<String, String> {
    let mut tokens = BTreeMap::new();
    for name in ["bos", "eos", "unk", "pad", "sep", "cls", "mask"].map(|n| format!("{n}_token")) {
        let v = &config[name.as_str()];
        if let Some(t) = v.as_str().or(v["content"].as_str()) {
            tokens.insert(name, t.into());
        }
    }
    tokens
}

fn bad(e: Error) -> GenerateError {
    // The detail alone where there is one: `raise_exception` speaks to the user.
    GenerateError::Template(match (e.detail(), e.line()) {
        (Some(detail), Some(line)) => format!("{detail} (line {line})"),
        _ => e.to_string(),
    })
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    env.add_filter("tojson", |value: Value, options: Kwargs| -> Result<Value, Error> {
        let indent = options.get::<Option<usize>>("indent")?;
        let json = dumps(&value, indent).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
        Ok(Value::from_safe_string(json))
    });
    env
}
