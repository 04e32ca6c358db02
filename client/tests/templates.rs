//! Chat templates of well-known models, against what Jinja2 makes of them (`templates/expected.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tacet_client::generate::{ChatTemplate, GenerateError, Message};

fn tokens() -> BTreeMap<String, String> {
    [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(k, v)| (k.into(), v.into())).into()
}

/// 2024-02-29 12:34:56 UTC.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_709_210_096)
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates")
}

#[test]
fn renders_what_jinja2_renders() {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(here().join("expected.json")).unwrap()).unwrap();
    assert!(cases.len() >= 100);
    let mut wrong = 0;
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let source = std::fs::read_to_string(here().join(format!("{name}.jinja"))).unwrap();
        let template = ChatTemplate::new(&source, tokens()).unwrap();
        let text = |v: &Value| v.as_str().unwrap().to_string();
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| Message::new(text(&m["role"]), text(&m["content"])))
            .collect();
        let variables = case["variables"].as_object().unwrap();
        let got = template.render(&messages, case["answer"].as_bool().unwrap(), variables, now());
        let same = match (&got, case["error"].as_str()) {
            (Ok(t), None) => t == case["text"].as_str().unwrap(),
            // The template's own words.
            (Err(GenerateError::Template(e)), Some(expected)) => e.starts_with(expected),
            _ => false,
        };
        if !same {
            wrong += 1;
            println!("{case:#}\ngot {:?}", got.map_err(|e| e.to_string()));
        }
    }
    assert_eq!(wrong, 0);
}

#[test]
fn bad_templates_and_variables_are_errors() {
    assert!(
        matches!(ChatTemplate::new("{% for %}", tokens()), Err(GenerateError::Template(e)) if e.contains("line 1"))
    );
    let render = |source: &str, variables: Value| {
        let Value::Object(variables) = variables else { unreachable!() };
        let messages = [Message::new("user", "hi")];
        ChatTemplate::new(source, tokens()).unwrap().render(&messages, true, &variables, now())
    };
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a + b %}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless, json!({})), Err(GenerateError::Template(e)) if e.contains("fuel")));
    let own = render("{{ x }}", json!({"messages": []}));
    assert!(matches!(own, Err(GenerateError::Parameter { name: "chat_template_kwargs", .. })));
    assert_eq!(render("{{ x.y }} {{ bos_token }}", json!({"x": {"y": "<&>"}})).unwrap(), "<&> <s>");
    assert!(render("{{ messages[0].content.nothing() }}", json!({})).is_err());
}

#[test]
fn a_models_directory_says_where_its_template_is() {
    let dir = std::env::temp_dir().join(format!("tacet-templates-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let load = |config: Value| {
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        ChatTemplate::load(&dir)
    };
    assert!(load(json!({"bos_token": "<s>"})).unwrap().is_none());
    let t = load(json!({"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}!"})).unwrap().unwrap();
    assert_eq!(t.render(&[], true, &Map::new(), now()).unwrap(), "<b>!");
    let named = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
    assert_eq!(load(json!({"chat_template": named})).unwrap().unwrap().source(), "d");
    assert!(load(json!({"chat_template": [{"name": "rag", "template": "r"}]})).is_err());
    std::fs::write(dir.join("chat_template.jinja"), "file").unwrap();
    assert_eq!(load(json!({"chat_template": "config"})).unwrap().unwrap().source(), "file");
    std::fs::write(dir.join("tokenizer_config.json"), "{").unwrap();
    assert!(matches!(ChatTemplate::load(&dir), Err(GenerateError::Template(e)) if e.contains("tokenizer_config.json")));
    std::fs::remove_dir_all(&dir).unwrap();
}
