//! An endpoint over toy models, on a port of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tacet_client::ClientError;
use tacet_client::generate::{Boxed, Codec, Decoder};
use tacet_client::serve::{About, Config, Embedder, Endpoint, Model, OpenDecoder, Registry, TextModel};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{Toy, Watch, byte_level, codec, codec_without_template};

/// What the toy chat model answers to everything.
pub const ANSWER: &str = "Hello there, wörld 🙂! How can I help?";
const CORPUS: &str = "<|im_start|>assistant\nHello there, wörld 🙂! How can I help?<|im_end|>\n\
    Once upon a time the café opened, and the rain stopped.<|endoftext|>";
pub const CONTEXT: usize = 128;

/// A running endpoint; dropping it stops it.
pub struct Served {
    pub addr: SocketAddr,
    pub watch: Arc<Watch>,
    pub endpoint: Arc<Endpoint>,
    task: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `toy` chats, `org/bare` completes (it has no template), `counts` embeds.
pub async fn serve(config: Config) -> Served {
    serve_with(config, |r| r).await
}

pub async fn serve_with(config: Config, change: impl FnOnce(Registry) -> Registry) -> Served {
    let watch = Arc::<Watch>::default();
    let about = |family: &str| About {
        created: 1_700_000_000,
        bytes: 1234,
        digest: "ab".repeat(32),
        family: family.into(),
        parameters: "1M".into(),
        quantisation: "Q8_0".into(),
    };
    let text = |codec: Codec| {
        let codec = Arc::new(codec);
        let open = Toys { codec: Arc::clone(&codec), corpus: CORPUS.into(), watch: Arc::clone(&watch) };
        Some(TextModel { codec, open: Arc::new(open) })
    };
    let embedder: Arc<dyn Embedder> = Arc::new(Counts(Arc::new(codec(CONTEXT))));
    let bare = text(codec_without_template(CONTEXT));
    let models = [
        Model { name: "toy".into(), about: about("llama"), text: text(codec(CONTEXT)), embedder: None },
        Model { name: "org/bare".into(), about: about("llama"), text: bare, embedder: None },
        Model { name: "counts".into(), about: about("bert"), text: None, embedder: Some(embedder) },
    ];
    let endpoint = Endpoint::new(config, change(Registry::new(models)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let serving = Arc::clone(&endpoint);
    let task = tokio::spawn(async move { serving.serve(listener).await.unwrap() });
    Served { addr, watch, endpoint, task }
}

/// Waits until something is so; the test fails if it never is.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..600 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never so: {what}");
}

/// Opens [`Toy`]s.
pub struct Toys {
    pub codec: Arc<Codec>,
    pub corpus: String,
    pub watch: Arc<Watch>,
}

impl OpenDecoder for Toys {
    fn open(&self) -> Boxed<'_, Result<Box<dyn Decoder>, ClientError>> {
        Box::pin(async move {
            if self.watch.unreachable.load(Ordering::SeqCst) {
                let (party, addr) = ("alpha".into(), ([127, 0, 0, 1], 1).into());
                return Err(ClientError::Unreachable { party, addr, reason: "refused".into() });
            }
            let toy: Box<dyn Decoder> = Box::new(Toy::new(&self.codec, &self.corpus, Arc::clone(&self.watch)));
            Ok(toy)
        })
    }
}

/// Counts of token values modulo 4, as a unit vector.
pub struct Counts(pub Arc<Codec>);

impl Embedder for Counts {
    fn limit(&self) -> usize {
        16
    }

    fn vocab(&self) -> usize {
        byte_level().get_vocab_size(true)
    }

    fn width(&self) -> usize {
        4
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, ClientError> {
        self.0.encode(&format!("{text}<|endoftext|>"), false).map_err(|e| ClientError::Config(e.to_string()))
    }

    fn embed<'a>(&'a self, tokens: &'a [u32]) -> Boxed<'a, Result<Vec<f64>, ClientError>> {
        let mut v = [0.0; 4];
        tokens.iter().for_each(|t| v[*t as usize % 4] += 1.0);
        let norm = v.iter().map(|x: &f64| x * x).sum::<f64>().sqrt();
        Box::pin(async move { Ok(v.iter().map(|x| x / norm).collect()) })
    }
}
